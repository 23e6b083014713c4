"""Whether a policy and a tokenizer belong together."""

from argrpo.models.llamagen import LlamaGen
from argrpo.models.vq import VQTokenizer


def check_pair(policy: LlamaGen, tokenizer: VQTokenizer) -> None:
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
