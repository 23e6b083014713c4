"""Draws the images of an evaluation: a policy, a tokenizer and how they are asked.

An image depends on the weights, its condition, the settings, the seed and its number, and not on
which process draws it, because batches are fixed (see image_set.py).

Shapes: N images of all, n of a batch.
"""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from argrpo.engine.conditions import Conditions, TextFeatures, num_images, select
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.evaluation.features import weights_hash
from argrpo.evaluation.image_set import DrawnBatch
from argrpo.models.image_policy import ImagePolicy
from argrpo.models.vq import VQTokenizer
from argrpo.pixels import to_uint8


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class DrawPlan:
    """Which images, and how."""

    conditions: Conditions  # of all N images
    seed: int
    batch: int  # images drawn and decoded together
    decode_batch: int
    pixels: str  # how floats become bytes, a rule of `to_uint8`


class ImageSource:
    """One policy with its decoder.

    Args:
        policy: draws tokens; its conditions are checked here.
        tokenizer: decodes them.
        plan: what to draw.

    Raises:
        ValueError: a condition that the policy does not know.
    """

    def __init__(self, policy: ImagePolicy, tokenizer: VQTokenizer, plan: DrawPlan) -> None:
        policy.check_conditions(plan.conditions)
        self._tokenizer, self._plan = tokenizer, plan
        self._engine = RolloutEngine(policy, max_slots=plan.batch)
        if self._engine.num_slots < plan.batch:
            raise ValueError(
                f"batch: expected at most {self._engine.num_slots}, which fit this machine's "
                f"memory, got {plan.batch}; fewer at a time would round otherwise"
            )
        self._weights = {"policy": weights_hash(policy), "tokenizer": weights_hash(tokenizer)}

    def settings(self, params: SamplingParams) -> dict[str, Any]:
        """All that the images depend on, for the folder that holds them."""
        plan = self._plan
        return {
            **self._weights,
            "conditions": _hash_of(plan.conditions),
            "sampling": asdict(params),
            "seed": plan.seed,
            "decode_batch": plan.decode_batch,
            "pixels": plan.pixels,
        }

    @torch.no_grad()
    def draw(self, rows: range, params: SamplingParams) -> DrawnBatch:
        """Draw and decode a batch of the images."""
        plan, ids = self._plan, torch.tensor(rows)
        conditions = select(plan.conditions, ids)
        rollout = self._engine.draw(conditions, params, seed=plan.seed, image_ids=ids)
        images = self._tokenizer.decode(rollout.token_ids, decode_batch=plan.decode_batch)
        levels = to_uint8(images.cpu(), plan.pixels)
        return DrawnBatch(levels.permute(0, 2, 3, 1), rollout.entropies.mean(dim=1).cpu())


def _hash_of(conditions: Conditions) -> str:
    """12 hex digits of all conditions in order."""
    tensors: list[Tensor] = [conditions] if isinstance(conditions, Tensor) else []
    if isinstance(conditions, TextFeatures):
        tensors = [conditions.features, conditions.mask, conditions.rows]
    digest = hashlib.blake2b(f"{num_images(conditions)}".encode(), digest_size=6)
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
