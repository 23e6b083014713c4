"""Ranges of the engine and of a training step as NVTX ranges, which nsys shows beside the kernels.

Each layer has a domain of its own, so that nsys can show one and hide the other. The package nvtx
is imported when ranges are made, that is where a run asked for them.
"""

from contextlib import AbstractContextManager

from argrpo.engine.ranges import Ranges

TRAINER_DOMAIN = "argrpo"
ENGINE_DOMAIN = "argrpo.engine"

# RGB by the word that a name starts with: what draws is blue, what judges green, what learns red to
# yellow. Numbers, because nvtx asks matplotlib for most names.
COLORS = {
    "step": 0x505050,
    "rollout": 0x1F4E9E,
    "prefill": 0x8A63D2,
    "capture": 0xA0A0A0,
    "admit": 0xB39DDB,
    "decode": 0x4A90E2,
    "reward": 0x2E8B57,
    "logprob": 0xE6B800,
    "reference": 0xF0D060,
    "update": 0xE67E22,
    "forward": 0xF2A07B,
    "backward": 0xC0392B,
    "optimizer": 0x7B241C,
    "evaluation": 0x76B947,
    "samples": 0x9BC4F2,
    "checkpoint": 0x202020,
}
_OTHER = 0xC0C0C0


def nvtx_ranges(domain: str) -> Ranges:
    """Ranges of one layer.

    Raises:
        ValueError: the package nvtx is missing.
    """
    try:
        import nvtx
    except ImportError as error:
        raise ValueError(
            "profile.tool: expected the package nvtx for nsys, got none; pip install nvtx"
        ) from error

    def ranges(name: str) -> AbstractContextManager[object]:
        opened: AbstractContextManager[object] = nvtx.annotate(
            message=name, color=color_of(name), domain=domain
        )
        return opened

    return ranges


def color_of(name: str) -> int:
    """The colour of a range, 0xRRGGBB: that of its first word, so decode[1..64] is as decode."""
    return COLORS.get(name.partition("[")[0].partition(" ")[0], _OTHER)
