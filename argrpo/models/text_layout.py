"""How a policy on disk wants its texts, without reading its weights.

So an encoder can be asked, and be gone again, before the policy comes into memory.
"""

from pathlib import Path

from argrpo.encoded_texts import TextLayout
from argrpo.models.checkpoint_files import read_checkpoint
from argrpo.models.policy_config import ARGRPO_MODEL_TYPE, ARGRPO_TEXT_PADDING

# Learned features [L, C] that stand for no text: LlamaGen's name, and AR-GRPO's folder's.
_NULL_TEXTS = ("cls_embedding.uncond_embedding", "gpt_model.cls_embedding.uncond_embedding")
_DEFAULT_PADDING = "left"


def text_layout(path: str | Path, *, text_padding: str | None = None) -> TextLayout | None:
    """The layout of a text-conditional policy's texts; None for one that reads none.

    Args:
        path: of any policy that `load_policy` takes.
        text_padding: as there: None takes what the path says (AR-GRPO's folders are of the right),
            and left where it says nothing.

    Raises:
        FileNotFoundError: nothing stands at the path.
        ValueError: the file is damaged.
    """
    checkpoint = read_checkpoint(path)
    found = [checkpoint.weights[name] for name in _NULL_TEXTS if name in checkpoint.weights]
    if not found:
        return None
    prefix_len, width = found[0].shape
    config = checkpoint.config or {}
    stated = config.get("config")
    if text_padding is None and isinstance(stated, dict):
        text_padding = stated.get("text_padding")
    if text_padding is None and config.get("model_type") == ARGRPO_MODEL_TYPE:
        text_padding = ARGRPO_TEXT_PADDING
    return TextLayout(prefix_len, width, text_padding or _DEFAULT_PADDING)
