"""How much memory an optimizer step will take, before the first one is taken.

Counted: the policy, its reference and the average of its weights where they stand on the policy's
device; masters, main gradients and Adam's moments; what a rollout's tokens carry; and the passes
of a micro-batch. Passes are rehearsed, because what a layer keeps depends on its attention: the
trunk on one and on two images, which gives a line, and the head on a whole micro-batch of zeros,
whose logits are made a chunk at a time and do not grow. Not counted: judges and tokenizer, the
engine's cache of keys and values, and the drawing itself.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.config import TrainConfig
from argrpo.engine.conditions import Conditions, select
from argrpo.engine.sampling_params import SamplingParams
from argrpo.head_gradients import backward
from argrpo.loss_batch import LossBatch, LossScale
from argrpo.models.llamagen import LlamaGen
from argrpo.peak_memory import MemoryUse, memory_use
from argrpo.token_scores import HeadInputs, TokensToScore, head_inputs

_FP32 = 4
# Token id, and fp32 log-probs of draw, pass before and reference, entropies of the draw.
_TOKEN_BYTES = 8 + 4 * _FP32


class Line(NamedTuple):
    """Bytes that grow with the images of a micro-batch."""

    fixed: float
    per_image: float

    @classmethod
    def through(cls, one: int, two: int) -> "Line":
        """What one and two images take."""
        return cls(fixed=2 * one - two, per_image=two - one)

    def at(self, num_images: int) -> float:
        return self.fixed + self.per_image * num_images


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

    def peak(self, micro_batch: int) -> int:
        """Bytes at the fullest moment with micro-batches of so many images."""
        passes = max(self.trunk.at(micro_batch), self.kept.at(micro_batch) + self.head)
        moments = (self.gradients_before + passes, self.gradients)
        return int(self.weights + self.optimizer + self.rollout + max(moments))

    def largest_micro_batch(self, num_bytes: int, num_images: int) -> int:
        """The most images, up to `num_images`, whose peak fits; 0 if not even one does."""
        fitting = [m for m in range(1, num_images + 1) if self.peak(m) <= num_bytes]
        return max(fitting, default=0)

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
    policy: LlamaGen, config: TrainConfig, conditions: Conditions
) -> MemoryForecast:
    """Rehearse small passes and add up what stands beside them. Leaves no gradient.

    Args:
        policy: before its first step, on its device.
        config: the run.
        conditions: of at least two images, on the policy's device.
    """
    images = config.images_per_step // config.minibatches
    micro_batch = min(config.micro_batch, images)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    count = sum(p.numel() for p in parameters)
    own = sum(p.nbytes for p in policy.parameters())
    is_fp32 = policy.head_weight.dtype == torch.float32
    is_single = micro_batch == images
    tokens = _zero_tokens(policy, config, conditions)
    trunk = [_trunk_use(policy, tokens, m) for m in (1, 2)]
    main_gradients = _FP32 * count
    # Those of a bf16 pass stand beside the main gradients of the passes before.
    beside = 0 if is_fp32 or is_single else own
    head_gradient = _FP32 * policy.head_weight.numel()
    return MemoryForecast(
        weights=own * (1 + _has_reference_beside(config)) + _average_bytes(policy, config),
        optimizer=(2 * _FP32 + (0 if is_fp32 else _FP32)) * count,
        gradients=main_gradients + beside,
        gradients_before=head_gradient if is_single else main_gradients,
        rollout=_rollout_bytes(policy, config),
        trunk=Line.through(*(use.peak for use in trunk)),
        kept=Line.through(*(_forward_use(policy, tokens, m).kept for m in (1, 2))),
        head=_head_use(policy, config, micro_batch).peak,
    )


def available_bytes(device: torch.device) -> int:
    """What a device could still give, by its driver or by the kernel's own estimate."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kilobytes) * 1024


def _zero_tokens(policy: LlamaGen, config: TrainConfig, conditions: Conditions) -> TokensToScore:
    is_guided = config.objective.policy == "guided"
    params = config.rollout if is_guided else SamplingParams()
    device = policy.head_weight.device
    shape = (2, policy.shape.num_image_tokens)
    token_ids = torch.zeros(shape, dtype=torch.int64, device=device)
    first = select(conditions, torch.arange(2, device=device))
    return TokensToScore(first, token_ids, params, None)


def _forward_use(policy: LlamaGen, tokens: TokensToScore, num_images: int) -> MemoryUse:
    rows = tokens.rows(torch.arange(num_images, device=tokens.token_ids.device))
    return memory_use(lambda: head_inputs(policy, rows), tokens.token_ids.device)


def _trunk_use(policy: LlamaGen, tokens: TokensToScore, num_images: int) -> MemoryUse:
    """Without the gradients of the weights, which come to be as activations go."""
    rows = tokens.rows(torch.arange(num_images, device=tokens.token_ids.device))
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def run() -> None:
        hidden = head_inputs(policy, rows).hidden
        hidden.backward(torch.zeros_like(hidden))

    try:
        return memory_use(run, tokens.token_ids.device)
    finally:
        policy.zero_grad(set_to_none=True)


def _head_use(policy: LlamaGen, config: TrainConfig, num_images: int) -> MemoryUse:
    """The head on hidden states of zeros; both stand before, as they do behind a trunk."""
    weight, num_tokens = policy.head_weight, policy.shape.num_image_tokens
    shape = (num_images, num_tokens)
    hidden = weight.new_zeros(num_images * num_tokens, weight.shape[1]).requires_grad_()
    token_ids = torch.zeros(num_images * num_tokens, dtype=torch.int64, device=weight.device)
    zeros = torch.zeros(shape, device=weight.device)
    several = config.updates_per_step > 1
    batch = LossBatch(
        zeros[:, 0],
        LossScale(num_images, num_images * num_tokens, num_tokens),
        old_logprobs=zeros if several else None,
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


def _all_kept(policy: LlamaGen, config: TrainConfig, num_rows: int) -> Tensor | None:
    if not _has_support(config):
        return None
    shape = (num_rows, (policy.shape.vocab_size + 7) // 8)
    return torch.full(shape, 255, dtype=torch.uint8, device=policy.head_weight.device)


def _rollout_bytes(policy: LlamaGen, config: TrainConfig) -> int:
    support = (policy.shape.vocab_size + 7) // 8 if _has_support(config) else 0
    return config.images_per_step * policy.shape.num_image_tokens * (_TOKEN_BYTES + support)


def _has_support(config: TrainConfig) -> bool:
    return config.objective.policy == "guided" and config.rollout.is_filtered


def _has_reference_beside(config: TrainConfig) -> bool:
    return config.objective.beta > 0 and config.reference.device == "policy"


def _average_bytes(policy: LlamaGen, config: TrainConfig) -> int:
    if config.weight_ema is None:
        return 0
    return _FP32 * sum(parameter.numel() for parameter in policy.parameters())


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
