"""A step's images between their draw and their scores, and what a checkpoint holds of a draw.

Shapes: N images of a step, T tokens of an image.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from argrpo.collection import Collected, draw_seed
from argrpo.config import TrainConfig
from argrpo.engine.conditions import Conditions
from argrpo.engine.rollout import Rollout
from argrpo.experience import FixedLogprobs
from argrpo.ranks import gather_images
from argrpo.token_scores import tokens_to_score


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class DrawnStep:
    """This rank's images of a step. No score is in it."""

    rollout: Rollout
    fixed: FixedLogprobs
    collected: Collected | None  # None: drawn by a process that ended, judges know nothing of it

    def tensors(self, image_ids: Tensor) -> dict[str, Tensor]:
        """What a checkpoint holds of all ranks' images, in the order of the images.

        Args:
            image_ids: [n] int64 on the CPU, this rank's.

        Raises:
            PeerError: another rank failed.
        """
        own = draw_tensors(self.rollout, self.fixed.old, self.fixed.reference)
        return {
            name: gather_images(tensor.view(len(tensor), -1), image_ids).view(-1, *tensor.shape[1:])
            for name, tensor in own.items()
        }


def draw_tensors(
    rollout: Rollout, old: Tensor | None, reference: Tensor | None
) -> dict[str, Tensor]:
    """What a checkpoint holds of a draw, not copies; conditions and texts follow from the step.

    Args:
        rollout: N images.
        old: [N, T] as in `FixedLogprobs`.
        reference: [N, T] as in `FixedLogprobs`.
    """
    found = {
        "rollout.token_ids": rollout.token_ids,
        "rollout.logprobs": rollout.logprobs,
        "rollout.cond_logprobs": rollout.cond_logprobs,
        "rollout.entropies": rollout.entropies,
        "rollout.support": rollout.support,
        "rollout.image_ids": rollout.image_ids,
        "old_logprobs": old,
        "ref_logprobs": reference,
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def restored_draw(
    tensors: Mapping[str, Tensor], conditions: Conditions, step: int, config: TrainConfig
) -> DrawnStep:
    """A draw again, of which no judge knows.

    Args:
        tensors: `draw_tensors`, of the images and on the device that are wanted.
        conditions: of the same images, on the same device.
        step: 0-based, that was drawn.
        config: the run.

    Raises:
        KeyError: a tensor is missing.
    """
    rollout = Rollout(
        token_ids=tensors["rollout.token_ids"],
        logprobs=tensors["rollout.logprobs"],
        cond_logprobs=tensors.get("rollout.cond_logprobs"),
        entropies=tensors["rollout.entropies"],
        support=tensors.get("rollout.support"),
        conditions=conditions,
        params=config.rollout,
        seed=draw_seed(config.seed, step),
        image_ids=tensors["rollout.image_ids"],
    )
    tokens = tokens_to_score(rollout, config.objective.policy)
    old, reference = tensors.get("old_logprobs"), tensors.get("ref_logprobs")
    return DrawnStep(rollout, FixedLogprobs(tokens, old, reference), None)
