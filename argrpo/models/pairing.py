"""Whether a policy, a tokenizer and the way images are drawn belong together."""

from argrpo.models.image_policy import ImagePolicy
from argrpo.models.vq import VQTokenizer


def check_pair(policy: ImagePolicy, tokenizer: VQTokenizer) -> None:
    """Refuse a policy and a tokenizer that speak of other codes or other pixels.

    Raises:
        ValueError: the codebook or the pixels of a token differ.
    """
    codes = tokenizer.config.codebook_size
    if codes != policy.config.vocab_size:
        raise ValueError(
            f"tokenizer.path: expected a codebook of {policy.config.vocab_size}, as the policy "
            f"has, got {codes}"
        )
    if tokenizer.downsample != policy.config.downsample:
        raise ValueError(
            f"policy.downsample: expected {tokenizer.downsample}, as the tokenizer has, "
            f"got {policy.config.downsample}"
        )


def check_label_dropout(policy: ImagePolicy, share: float) -> None:
    """Refuse to drop classes of a policy that reads none, or that knows no null condition to take
    their place.

    Raises:
        ValueError: a share above 0 of such a policy.
    """
    if share and policy.config.model_type != "c2i":
        raise ValueError(
            f"parity.label_dropout: expected 0 for a text-conditional policy, got {share:g}"
        )
    if share and not policy.has_null_condition:
        raise ValueError(
            "parity.label_dropout: expected 0, because this policy was trained without a null "
            f"condition, got {share:g}"
        )


def check_first_token_mask(policy: ImagePolicy, is_used: bool) -> None:
    """Refuse the mask of padded texts for a policy whose texts are padded elsewhere, or not at all.

    Raises:
        ValueError: it is used with such a policy.
    """
    if is_used and policy.config.text_padding != "right":
        raise ValueError(
            "parity.first_token_mask: expected policy.text_padding right with it, got "
            f"{policy.config.text_padding}"
        )


def check_guidance(policy: ImagePolicy, setting: str, *scales: float) -> None:
    """Refuse guidance of a policy that knows no null condition.

    Args:
        policy: the model.
        setting: the name of the setting that holds the guidance, for the message.
        scales: what images are to be drawn with.

    Raises:
        ValueError: guidance, and nothing to be guided by.
    """
    guided = [scale for scale in scales if scale != 1]
    if guided and not policy.has_null_condition:
        raise ValueError(
            f"{setting}: expected 1, because this policy was trained without a null condition to "
            f"be guided by, got {guided[0]:g}"
        )
