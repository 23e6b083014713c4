"""How much memory an optimizer step will take, before the first one is taken.

Counted: the policy, its reference and the average of its weights where they stand on the policy's
device; masters, main gradients and Adam's moments; what a rollout's tokens carry; and the passes
of a micro-batch. Passes are rehearsed, because what a layer keeps depends on its attention: the
trunk on one image, on two of a prompt and on two of different prompts, which says what an image and
what a text adds, and the head on a whole micro-batch of zeros, whose logits are made a chunk at a
time and do not grow. Not counted: judges and tokenizer, the engine's cache of keys and values, and
the drawing itself.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.config import TrainConfig
from argrpo.engine.conditions import Conditions, TextFeatures, num_images, select
from argrpo.engine.sampling_params import SamplingParams
from argrpo.head_gradients import backward
from argrpo.loss_batch import LossBatch, LossScale
from argrpo.models.image_policy import ImagePolicy
from argrpo.peak_memory import MemoryUse, memory_use
from argrpo.ranks import num_ranks
from argrpo.token_scores import HeadInputs, TokensToScore, head_inputs

_FP32 = 4
_CACHE_SHARE = 0.8  # of what an optimizer step leaves; the rest is for graphs, decoding and judges
# Token id, and fp32 log-probs of draw, pass before and reference, entropies of the draw.
_TOKEN_BYTES = 8 + 4 * _FP32


class Line(NamedTuple):
    """Bytes that grow with the images of a micro-batch, and with the texts that they share."""

    fixed: float
    per_image: float
    per_prompt: float = 0.0

    @classmethod
    def through(cls, one: int, same: int, other: int) -> "Line":
        """What one image takes, two of one prompt, and two of different prompts."""
        per_image, per_prompt = same - one, other - same
        return cls(one - per_image - per_prompt, per_image, per_prompt)

    def at(self, num_images: int, num_prompts: int) -> float:
        return self.fixed + self.per_image * num_images + self.per_prompt * num_prompts


@dataclass(frozen=True, slots=True)
class MemoryForecast:
    """Bytes of an optimizer step."""

    weights: int  # policy, reference, average
    optimizer: int  # masters and moments
    gradients: int  # all of them, when a backward pass ends
    gradients_before: int  # those that stand when it begins
    rollout: int
    trunk: Line  # the peak of a forward and backward pass of the trunk
    kept: Line  # by its forward pass, while the head works
    head: int
    images_per_prompt: int = 1

    def peak(self, micro_batch: int) -> int:
        """Bytes at the fullest moment with micro-batches of so many images."""
        images = (micro_batch, _most_prompts(micro_batch, self.images_per_prompt))
        passes = max(self.trunk.at(*images), self.kept.at(*images) + self.head)
        moments = (self.gradients_before + passes, self.gradients)
        return int(self.weights + self.optimizer + self.rollout + max(moments))

    def largest_micro_batch(self, num_bytes: int, num_images: int) -> int:
        """The most images, up to `num_images`, whose peak fits; 0 if not even one does."""
        fitting = [m for m in range(1, num_images + 1) if self.peak(m) <= num_bytes]
        return max(fitting, default=0)

    def left_for_cache(self, config: TrainConfig, num_bytes: int) -> int:
        """Bytes of keys and values that fit beside an optimizer step.

        Args:
            config: the run.
            num_bytes: what there is for all of it, the weights that stand already included.

        Raises:
            ValueError: nothing is left.
        """
        images = config.images_per_step // config.minibatches
        peak = self.peak(min(config.micro_batch, images))
        left = int(_CACHE_SHARE * (num_bytes - peak))
        if left <= 0:
            raise ValueError(
                f"micro_batch: expected an optimizer step that leaves room to draw images, got one "
                f"of {_size(peak)} in {_size(num_bytes)}; lower it, or set gradient_checkpointing, "
                "reference.device cpu or policy.dtype bfloat16"
            )
        return left

    def describe(self, config: TrainConfig, num_bytes: int) -> list[str]:
        """What is foreseen, and a micro-batch that fits, in words.

        Args:
            config: the run.
            num_bytes: what there is for all of it, the weights that stand already included.
        """
        images = config.images_per_step // config.minibatches
        micro_batch = min(config.micro_batch, images)
        peak, fitting = self.peak(micro_batch), self.largest_micro_batch(num_bytes, images)
        lines = [
            f"an optimizer step holds {_size(peak)} at its peak with micro-batches of "
            f"{micro_batch}: weights {_size(self.weights)}, optimizer "
            f"{_size(self.optimizer + self.gradients)}, each image more "
            f"{_size(self.trunk.per_image)}; judges, tokenizer and drawing come on top"
        ]
        if fitting == 0:
            lines.append(
                f"that is more than the {_size(num_bytes)} there are, for any micro_batch; set "
                "gradient_checkpointing, reference.device cpu or policy.dtype bfloat16"
            )
        elif fitting != micro_batch:
            lines.append(f"in {_size(num_bytes)} micro_batch {fitting} fits")
        return lines


def forecast_memory(
    policy: ImagePolicy, config: TrainConfig, conditions: Conditions
) -> MemoryForecast:
    """Rehearse small passes and add up what stands beside them. Leaves no gradient.

    Args:
        policy: before its first step, on its device.
        config: the run.
        conditions: the longest among them, on the policy's device; the two longest are rehearsed.
    """
    images = config.images_per_step // config.minibatches
    micro_batch = min(config.micro_batch, images)
    own = sum(p.nbytes for p in policy.parameters())
    rehearsed = _zero_tokens(policy, config, conditions)
    gradients, gradients_before = _gradient_bytes(policy, config, is_single=micro_batch == images)
    return MemoryForecast(
        weights=own * (1 + _has_reference_beside(config)) + _average_bytes(policy, config),
        optimizer=_optimizer_bytes(policy, config),
        gradients=gradients,
        gradients_before=gradients_before,
        rollout=_rollout_bytes(policy, config),
        trunk=Line.through(*(_trunk_use(policy, part).peak for part in rehearsed)),
        kept=Line.through(*(_forward_use(policy, part).kept for part in rehearsed)),
        head=_head_use(policy, config, micro_batch).peak,
        images_per_prompt=config.images_per_prompt,
    )


def _optimizer_bytes(policy: ImagePolicy, config: TrainConfig) -> int:
    """Moments, and masters apart from the weights: of fp32 only where ranks hold a part each."""
    count, own = _trained_size(policy)
    if config.parity.bf16_masters:
        return 2 * own
    has_masters = policy.head_weight.dtype != torch.float32 or num_ranks() > 1
    return (2 + has_masters) * _FP32 * count // num_ranks()


def _gradient_bytes(
    policy: ImagePolicy, config: TrainConfig, *, is_single: bool
) -> tuple[int, int]:
    """All gradients when a backward pass ends, and those that stand when it begins."""
    count, own = _trained_size(policy)
    head = _FP32 * policy.head_weight.numel()
    if config.parity.bf16_masters:
        # Passes add up in bf16, but the head's gradient is made in fp32 each time.
        return own + head, head if is_single else own + head
    # Those of a bf16 pass stand beside the main gradients of the passes before.
    beside = 0 if is_single or policy.head_weight.dtype == torch.float32 else own
    return _FP32 * count + beside, head if is_single else _FP32 * count


def _trained_size(policy: ImagePolicy) -> tuple[int, int]:
    """How many weights are trained, and their bytes."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)


def available_bytes(device: torch.device) -> int:
    """What a device could still give, by its driver or by the kernel's own estimate."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kilobytes) * 1024


def _zero_tokens(
    policy: ImagePolicy, config: TrainConfig, conditions: Conditions
) -> list[TokensToScore]:
    """One image, two of its prompt, and two of different prompts."""
    is_guided = config.objective.policy == "guided"
    params = config.rollout if is_guided else SamplingParams()
    first, second = _longest(conditions)
    device = policy.head_weight.device
    parts = []
    for prompts in ([first], [first, first], [first, second]):
        shape = (len(prompts), policy.shape.num_image_tokens)
        token_ids = torch.zeros(shape, dtype=torch.int64, device=device)
        chosen = select(conditions, torch.tensor(prompts, device=device))
        parts.append(TokensToScore(chosen, token_ids, params, None))
    return parts


def _longest(conditions: Conditions) -> tuple[int, int]:
    """The rows of the two longest texts; where there is one row only, twice that."""
    last = num_images(conditions) - 1
    if not isinstance(conditions, TextFeatures):
        return 0, min(1, last)
    order = conditions.mask[conditions.rows].bool().sum(dim=1).argsort(descending=True).tolist()
    return order[0], order[min(1, last)]


def _most_prompts(num_images: int, images_per_prompt: int) -> int:
    """Of how many prompts so many neighbouring images of a step can be."""
    # A micro-batch begins after a multiple of its size: at most so far inside a prompt's images.
    inside = images_per_prompt - math.gcd(num_images, images_per_prompt)
    return (inside + num_images - 1) // images_per_prompt + 1


def _forward_use(policy: ImagePolicy, tokens: TokensToScore) -> MemoryUse:
    return memory_use(lambda: head_inputs(policy, tokens), tokens.token_ids.device)


def _trunk_use(policy: ImagePolicy, tokens: TokensToScore) -> MemoryUse:
    """Without the gradients of the weights, which come to be as activations go."""
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def run() -> None:
        hidden = head_inputs(policy, tokens).hidden
        hidden.backward(torch.zeros_like(hidden))

    try:
        return memory_use(run, tokens.token_ids.device)
    finally:
        policy.zero_grad(set_to_none=True)


def _head_use(policy: ImagePolicy, config: TrainConfig, num_images: int) -> MemoryUse:
    """The head on hidden states of zeros; both stand before, as they do behind a trunk."""
    weight, num_tokens = policy.head_weight, policy.shape.num_image_tokens
    shape = (num_images, num_tokens)
    hidden = weight.new_zeros(num_images * num_tokens, weight.shape[1]).requires_grad_()
    token_ids = torch.zeros(num_images * num_tokens, dtype=torch.int64, device=weight.device)
    zeros = torch.zeros(shape, device=weight.device)
    batch = LossBatch(
        zeros[:, 0],
        LossScale(num_images, num_images * num_tokens, num_tokens),
        old_logprobs=zeros if config.keeps_old_logprobs else None,
        ref_logprobs=zeros if config.objective.beta > 0 else None,
        draw_logprobs=zeros if config.objective.needs_draw_logprobs else None,
    )
    weight_grad = torch.zeros_like(weight, dtype=torch.float32)
    support = _all_kept(policy, config, len(token_ids))
    inputs = HeadInputs(hidden, token_ids, config.rollout.temperature, support)
    return memory_use(
        lambda: backward(inputs, weight, weight_grad, batch, config.objective) and None,
        weight.device,
    )


def _all_kept(policy: ImagePolicy, config: TrainConfig, num_rows: int) -> Tensor | None:
    if not _has_support(config):
        return None
    shape = (num_rows, (policy.shape.vocab_size + 7) // 8)
    return torch.full(shape, 255, dtype=torch.uint8, device=policy.head_weight.device)


def _rollout_bytes(policy: ImagePolicy, config: TrainConfig) -> int:
    support = (policy.shape.vocab_size + 7) // 8 if _has_support(config) else 0
    num_images = config.images_per_step * (2 if config.draw_ahead else 1)
    return num_images * policy.shape.num_image_tokens * (_TOKEN_BYTES + support)


def _has_support(config: TrainConfig) -> bool:
    return config.objective.policy == "guided" and config.rollout.is_filtered


def _has_reference_beside(config: TrainConfig) -> bool:
    return config.objective.beta > 0 and config.reference.device == "policy"


def _average_bytes(policy: ImagePolicy, config: TrainConfig) -> int:
    if config.weight_ema is None:
        return 0
    return _FP32 * sum(parameter.numel() for parameter in policy.parameters())


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
