"""What a step costs on any number of GPUs, from rows measured on one or from operations and bytes.

scale_model.py says what is assumed, and prints it all as tables.
"""

from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

import torch
from result_rows import Row
from rollout_contenders import MODELS, NUM_CLASSES, VOCAB_SIZE
from roofline import StepSizes, least_rollout_us
from timing import Ceilings
from torch.utils.flop_counter import FlopCounterMode

from argrpo.models.vq import VQConfig, VQTokenizer

Way = Literal["data-parallel", "FSDP"]
WAYS: tuple[Way, ...] = ("data-parallel", "FSDP")
DOWNSAMPLE = 16
_BF16, _FP32 = 2, 4
# AdamW reads the gradient, the master and two moments and writes back three of them; the norm reads
# the gradient once more; bf16 weights are made from the masters.
_OPTIMIZER_BYTES = 7 * _FP32 + _FP32 + _FP32 + _BF16
# Held: master, two moments and gradient in fp32.
_SHARDED_BYTES = 4 * _FP32


class Machine(NamedTuple):
    """What is assumed of the GPUs and of what connects them; all but `node` in units a second."""

    ceilings: Ceilings
    rollout_share: float  # of the roofline's speed that a rollout reaches
    compute_share: float  # of the matrix rate that decoding and training reach
    nvlink: float  # bytes that a GPU sends to its node
    network: float  # bytes that a GPU sends out of its node, each GPU through a link of its own
    node: int = 8  # GPUs of a node


class Work(NamedTuple):
    """What each GPU does in a step."""

    model: str
    image_size: int
    images: int
    micro_batch: int
    guidance_scale: float

    @property
    def num_tokens(self) -> int:
        return (self.image_size // DOWNSAMPLE) ** 2

    @property
    def sizes(self) -> StepSizes:
        one = MODELS[self.model]
        branches = 2 if self.guidance_scale > 1 else 1
        return StepSizes(
            *(one.dim, one.num_layers, one.ffn_dim, VOCAB_SIZE, self.images, branches),
            itemsize=_BF16,
            cache_itemsize=_BF16,
        )

    @property
    def num_weights(self) -> int:
        """Layers, head, and the embeddings of tokens and classes; norms are too few to count."""
        sizes = self.sizes
        return sizes.layer_weights + 2 * sizes.head_weights + (NUM_CLASSES + 1) * sizes.dim


class Cost(NamedTuple):
    """Seconds, and whether somebody held the watch."""

    seconds: float
    is_measured: bool = False

    def __str__(self) -> str:
        return f"{self.seconds:.3f} {'m' if self.is_measured else 'p'}"


class Traffic(NamedTuple):
    """What one GPU sends in a step."""

    num_bytes: float
    seconds: float


def phases(work: Work, machine: Machine, rows: Sequence[Row]) -> dict[str, Cost]:
    """What a step does on one GPU, one thing after the other."""
    sizes, tokens = work.sizes, work.images * work.num_tokens
    # Causal attention multiplies queries by half the keys, and weights by half the values.
    trunk = tokens * (2 * sizes.layer_weights + 2 * work.num_tokens * sizes.dim * sizes.num_layers)
    head = tokens * 2 * sizes.head_weights
    decode = work.images * decode_flops(work.image_size)
    rate = machine.ceilings.flops_per_second * machine.compute_share
    moved = work.num_weights * _OPTIMIZER_BYTES
    return {
        "rollout": measured_rollout(work, rows) or Cost(_least_rollout(work, machine)),
        "decode": Cost(decode / rate),
        "reference": Cost((trunk + head) / rate),
        "trunk": measured_trunk(work, rows) or Cost(3 * trunk / rate),
        "head": Cost(3 * head / rate),
        "optimizer": Cost(moved / machine.ceilings.bytes_per_second),
    }


def measured_rollout(work: Work, rows: Sequence[Row]) -> Cost | None:
    """From the last row of our engine at this size; None where there is none."""
    for row in reversed(rows):
        if (
            row.get("bench") == "rollout"
            and _is_of(row, work)
            and row.get("images") == work.images
            and row.get("guidance_scale") == work.guidance_scale
        ):
            is_whole = "rollout_images_per_s" in row
            speed: float = row["rollout_images_per_s" if is_whole else "images_per_s"]
            return Cost(work.images / speed, is_measured=True)
    return None


def measured_trunk(work: Work, rows: Sequence[Row]) -> Cost | None:
    """Forward and backward of all images, from a row of the trunk with any number of them."""
    for row in reversed(rows):
        if row.get("bench") == "trunk" and _is_of(row, work):
            return Cost(row["p50_ms"] / 1e3 / row["images"] * work.images, is_measured=True)
    return None


def traffic(work: Work, machine: Machine, num_gpus: int, way: Way) -> Traffic:
    """What a GPU sends in a step.

    data-parallel: one ring all-reduce of the fp32 gradients, 2 (n - 1) / n of their bytes.
    FSDP: bf16 weights are gathered for the rollout, for the reference, and forwards and backwards
    in each micro-batch, fp32 gradients scattered after it: (n - 1) / n of the bytes each time.
    """
    if way == "data-parallel":
        moved = 2 * work.num_weights * _FP32
    else:
        passes = -(-work.images // work.micro_batch)
        moved = work.num_weights * (2 * _BF16 + passes * (2 * _BF16 + _FP32))
    num_bytes = moved * (num_gpus - 1) / num_gpus
    # As many rings as a node has GPUs, each leaving it by another link: across nodes a GPU's bytes
    # pass at the rate of all links together, unless the node itself is slower.
    rate = machine.nvlink
    if num_gpus > machine.node:
        rate = min(rate, machine.node * machine.network)
    return Traffic(num_bytes, num_bytes / rate)


def step_cost(work: Work, machine: Machine, rows: Sequence[Row], num_gpus: int, way: Way) -> Cost:
    """A whole step; of one GPU it is measured where all its phases are."""
    costs = phases(work, machine, rows)
    if way == "FSDP":
        costs["optimizer"] = Cost(costs["optimizer"].seconds / num_gpus)
    seconds = sum(cost.seconds for cost in costs.values())
    seconds += traffic(work, machine, num_gpus, way).seconds
    is_measured = num_gpus == 1 and all(cost.is_measured for cost in costs.values())
    return Cost(seconds, is_measured)


def state_bytes(work: Work, num_gpus: int, way: Way) -> float:
    """Weights and what the optimizer holds of them, on one GPU; no cache and no activations.

    With FSDP the bf16 weights still stand whole while images are drawn.
    """
    reference = work.num_weights * _BF16
    if way == "data-parallel":
        return work.num_weights * (_BF16 + _SHARDED_BYTES) + reference
    return work.num_weights * (_BF16 + _SHARDED_BYTES / num_gpus) + reference / num_gpus


@cache
def decode_flops(image_size: int) -> int:
    """Operations that turn the tokens of one image into pixels, counted on the VQ-16 decoder."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        side, config = image_size // DOWNSAMPLE, VQConfig()
        VQTokenizer(config).decode_latents(torch.empty(1, config.codebook_dim, side, side))
    return counter.get_total_flops()


def _least_rollout(work: Work, machine: Machine) -> float:
    least = least_rollout_us(work.sizes, work.num_tokens, machine.ceilings) / 1e6
    return least / machine.rollout_share


def _is_of(row: Row, work: Work) -> bool:
    """Whether a row is of our code, of this model, on a GPU."""
    return (
        row.get("contender") == "argrpo"
        and row.get("dtype") == "bfloat16"
        and "driver" in row
        and not row.get("text_tokens")
        and (row.get("model"), row.get("image_size")) == (work.model, work.image_size)
    )
