"""Classes that a checkpoint names beside its weights, as the callbacks of a training framework.

Stand-ins for them hold nothing and do nothing, so whatever a file makes of them runs no code.
"""

import io
import pickletools
import struct
from pathlib import Path
from typing import Self

LIGHTNING = ("pytorch_lightning", "lightning", "lightning_fabric", "torchmetrics", "omegaconf")
"""Packages whose objects PyTorch Lightning's checkpoints carry."""

# A subclass of dict in its own package; its items come by an opcode that real dicts alone take.
_MAPPINGS = ("AttributeDict",)


_HEAD = 65536  # bytes, looked at for what a pickle would import


class Inert:
    """Takes any arguments and any state, and keeps none."""

    def __new__(cls, *arguments: object, **options: object) -> Self:
        return super().__new__(cls)

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def stand_in(name: str, packages: tuple[str, ...]) -> type | None:
    """What takes the place of a class in one of some packages.

    Args:
        name: with its module, as pytorch_lightning.callbacks.ModelCheckpoint.
        packages: first parts of names.

    Returns:
        A class of its own, since PyTorch tells allowed classes apart by their names; None for a
        name in none of the packages.
    """
    if name.partition(".")[0] not in packages:
        return None
    short = name.rpartition(".")[2]
    return dict if short in _MAPPINGS else type(short, (Inert,), {})


def first_global(path: Path) -> str | None:
    """The first thing that a pickle would import; its opcodes are listed, none is executed."""
    with path.open("rb") as file:
        head = io.BytesIO(file.read(_HEAD))
    texts: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(head):
            if opcode.name in ("GLOBAL", "INST"):
                return str(argument).replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(texts[-2:])
            if isinstance(argument, str):
                texts.append(argument)
    except (
        ValueError,
        EOFError,
        LookupError,
        OverflowError,
        struct.error,
    ):  # damaged, or cut off behind it
        pass
    return None
