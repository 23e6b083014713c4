"""One draw, checked: what the runners work from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from argrpo.engine.conditions import Conditions, moved_to, num_images
from argrpo.engine.policy import Policy
from argrpo.engine.sampling_params import SamplingParams
from argrpo.kernels.draw import DrawSettings

Progress: TypeAlias = Callable[[int, int], None]  # (tokens drawn so far, tokens in all)


class TokenCount:
    """Counts the tokens of a draw, and tells whoever wants to know."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._drawn, self._total, self._progress = 0, total, progress

    def add(self, count: int) -> None:
        """So many more are drawn."""
        self._drawn += count
        if self._progress is not None:
            self._progress(self._drawn, self._total)


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class DrawRequest:
    """The images of one `draw`."""

    conditions: Conditions
    params: SamplingParams
    settings: DrawSettings
    seed: int
    image_ids: Tensor  # [N] int64
    wants_cond_logprobs: bool
    wants_support: bool
    tokens: TokenCount

    @property
    def num_images(self) -> int:
        return len(self.image_ids)


def check_request(
    policy: Policy,
    conditions: Conditions,
    params: SamplingParams,
    *,
    seed: int,
    image_ids: Tensor | None,
    cond_logprobs: bool,
    support: bool,
    progress: Progress | None,
) -> DrawRequest:
    """The arguments of `RolloutEngine.draw` as a request on the policy's device.

    Raises:
        ValueError: as `RolloutEngine.draw`.
    """
    policy.check_conditions(conditions)
    device = policy.head_weight.device
    count = num_images(conditions)
    ids = torch.arange(count) if image_ids is None else image_ids
    if ids.dtype != torch.int64 or ids.shape != (count,):
        raise ValueError(
            f"image_ids: expected int64 of shape [{count}], got {ids.dtype} {list(ids.shape)}"
        )
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected a signed 64-bit integer, got {seed!r}")
    if cond_logprobs and params.temperature == 0:
        raise ValueError("cond_logprobs: expected a temperature above 0, got a greedy draw")
    scalars = [params.guidance_scale, params.temperature, params.top_k, params.top_p]
    return DrawRequest(
        conditions=moved_to(conditions, device),
        params=params,
        settings=DrawSettings(torch.tensor(scalars, device=device), params.is_filtered),
        seed=seed,
        image_ids=ids.to(device),
        wants_cond_logprobs=cond_logprobs,
        wants_support=support and params.is_filtered,
        tokens=TokenCount(count * policy.shape.num_image_tokens, progress),
    )
