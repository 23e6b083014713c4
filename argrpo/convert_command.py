"""The flags of `argrpo convert`."""

import argparse
from typing import NamedTuple

from argrpo.command_words import CommandWords
from argrpo.convert import FORMS, ReadOptions


class ConvertCommand(NamedTuple):
    """What a command line asks for."""

    form: str
    paths: list[str]
    options: ReadOptions


def parse_convert(arguments: list[str]) -> ConvertCommand:
    """The words behind `argrpo convert`.

    Raises:
        SystemExit: help was asked for.
        ValueError: a word is none of the command's.
    """
    listing = "\n".join(
        f"  {name:<20} {' '.join(form.arguments):<22} {form.help}" for name, form in FORMS.items()
    )
    parser = CommandWords(
        prog="argrpo convert",
        usage="argrpo convert FORM PATH ... [--setting value]",
        description="Write a model in the form that another code reads, or read taming's form.",
        epilog=f"forms, and the paths that each takes:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("form", choices=list(FORMS), metavar="FORM", help="one of those below")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="the last is written")
    parser.add_argument("--image_size", type=int, help="pixels a side, where no file says it")
    parser.add_argument("--num_heads", type=int, help="attention heads, of an unpublished width")
    parser.add_argument(
        "--downsample", type=int, default=16, help="pixels a side of a token, where no file says it"
    )
    parser.add_argument(
        "--text_padding", choices=["left", "right"], help="where padding stands in texts"
    )
    parser.add_argument(
        "--part", choices=["policy", "tokenizer"], help="of a folder that holds both"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of what is written; default: as read"
    )
    chosen = parser.parse_args(arguments)
    options = ReadOptions(
        image_size=chosen.image_size,
        num_heads=chosen.num_heads,
        downsample=chosen.downsample,
        text_padding=chosen.text_padding,
        part=chosen.part,
        dtype=chosen.dtype,
    )
    return ConvertCommand(chosen.form, chosen.paths, options)
