"""A small frozen T5 for captions of digits, made on the spot: random weights, a word a token.

Random features tell words apart, which is all that a policy needs that learns what they mean; and
everything behind them is the path of a real encoder: the folder, its tokenizer, the end token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from argrpo.digits.training import seeded_init

_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"


@dataclass(frozen=True, kw_only=True)
class DigitsTextEncoderConfig:
    """Sizes of the encoder."""

    width: int = 64
    """Features of a position."""

    num_layers: int = 2
    num_heads: int = 4
    seed: int = 5
    """Of the weights."""


def save_text_encoder(
    config: DigitsTextEncoderConfig, words: Sequence[str], folder: str | Path
) -> None:
    """Write an encoder that knows some words as a transformers folder, made if need be.

    Args:
        config: its sizes.
        words: in lower case; any other word is unknown, and all unknown ones are alike.
        folder: for `argrpo.text_encoder.load_text_encoder`.
    """
    # Seconds to import, which only who builds one waits for.
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    from argrpo.text_encoder import quietly

    # In T5's order, whose padding and end are 0 and 1.
    vocab = {word: row for row, word in enumerate([_PAD, _END, _UNKNOWN, *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # commas are words of their own
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {_END}", special_tokens=[(_END, vocab[_END])]
    )
    special = {"pad_token": _PAD, "eos_token": _END, "unk_token": _UNKNOWN}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = T5Config(
        vocab_size=len(vocab),
        d_model=config.width,
        d_kv=config.width // config.num_heads,
        d_ff=2 * config.width,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
    with seeded_init(config.seed):
        model = T5EncoderModel(sizes)
    with quietly():
        model.eval().save_pretrained(folder)
