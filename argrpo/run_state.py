"""All that a run is between two moments, as a checkpoint holds it.

weights and reference   model.safetensors (as shown), raw.* where that is the average, reference
learner.*               masters, moments, average, a reference that follows, label dropout, counters
judges.* entropy.*      distribution rewards, entropy control
evaluation.*            scores of the base policy, for win rates; the value of the best policy
random.*                the global generators, for judges of the caller's
in_flight.*             a rollout that is drawn and judged, and how far its optimizer steps are
ahead.*                 a rollout that was drawn before its turn, with draw_ahead
pending                 a finished step that is not logged yet
optimizer_parts         the folder of masters and moments, where ranks write them apart

The learning rate, the prompts and the seed of each draw follow from the number of the step and the
run's seed: the number of finished steps is all of them.
"""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argrpo.best_checkpoint import BestCheckpoint
from argrpo.checkpoint_names import Position
from argrpo.checkpoints import Snapshot
from argrpo.config import TrainConfig
from argrpo.evaluation.during_training import Evaluation
from argrpo.learner import Learner
from argrpo.models.image_policy import ImagePolicy
from argrpo.models.loading import load_published_weights, policy_record, published_weights
from argrpo.random_state import check_random_state, seed_generators, set_random_state
from argrpo.ranks import is_first
from argrpo.run_folder import plain
from argrpo.state_names import part_of, with_prefixes
from argrpo.training_step import StepOutcome, TrainingStep

PARTS = "optimizer_"  # before the name of a checkpoint


class RunState:
    """The parts of a run that have state, and how far it is."""

    def __init__(
        self,
        config: TrainConfig,
        policy: ImagePolicy,
        learner: Learner,
        step: TrainingStep,
        evaluation: Evaluation | None,
        best: BestCheckpoint | None,
    ) -> None:
        self._config = config
        self._policy = policy
        self._learner = learner
        self._step = step
        self._evaluation = evaluation
        self._best = best
        self.num_finished = 0
        """Steps of which all optimizer steps are done."""
        self.pending: StepOutcome | None = None
        """Of the last of them, until it is logged."""
        self.has_begun = False
        """Whether the policy before training was shown and evaluated."""
        self._random: dict[str, Tensor] | None = None

    @property
    def position(self) -> Position:
        """Where the run is."""
        now = self._step.in_flight
        return Position(self.num_finished, None if now is None else now.progress.num_updates)

    @property
    def parts_name(self) -> str | None:
        """The folder of the optimizer's state beside the checkpoint; None where it is inside."""
        in_parts = self._config.distributed.save == "parts"
        return f"{PARTS}{self.position.name}" if in_parts else None

    def write_parts(self, folder: Path) -> None:
        """Write the optimizer's state, each rank its own rows, if the config wants it so.

        All ranks call it together. Parts whose checkpoint is gone are removed.

        Args:
            folder: of all checkpoints.

        Raises:
            StorageError: a disk is full or refused.
            PeerError: another rank failed.
        """
        if self.parts_name is None:
            return
        # DCP takes a second to import, and few runs need it.
        from argrpo.sharded_state import write_shards

        if is_first():
            for old in folder.glob(f"{PARTS}*"):
                if not (folder / old.name.removeprefix(PARTS)).exists():
                    shutil.rmtree(old)
        write_shards(folder / self.parts_name, self._learner.own_rows())

    def snapshot(self, *, with_reference: bool) -> Snapshot:
        """The run as it is; the tensors are not copies, except those of an average.

        Args:
            with_reference: the frozen reference too, if there is one.
        """
        parts = {
            "step": self._step.tensors(),
            "evaluation": {} if self._evaluation is None else self._evaluation.state_dict(),
            "raw": published_weights(self._policy) if self._config.weight_ema else {},
        }
        reference = self._learner.frozen_reference if with_reference else None
        return Snapshot(
            self.position,
            self._learner.shown_weights(),
            policy_record(self._policy),
            with_prefixes(parts),
            {
                "config": plain(dataclasses.asdict(self._config)),
                "optimizer_parts": self.parts_name,
                "pending": None if self.pending is None else self.pending._asdict(),
                "best": None if self._best is None else self._best.value,
                **self._step.state(),
            },
            None if reference is None else reference.state_dict(),
        )

    def set_generators(self, device: torch.device) -> None:
        """Bring the global random generators to where the run is.

        Raises:
            ValueError: a checkpoint says nothing of one.
        """
        if self._random is None:
            seed_generators(self._config.seed)
        else:
            set_random_state(self._random, device)

    def load(self, snapshot: Snapshot, folder: Path) -> None:
        """Go on where a snapshot was taken; the policy was made of its `model`.

        Args:
            snapshot: of a checkpoint.
            folder: in which the checkpoint lies.

        Raises:
            ValueError: something is missing, or of another shape; the run cannot be used then.
        """
        try:
            tensors = {**snapshot.tensors, **self._parts(snapshot.state, folder)}
            self._load(tensors, snapshot.state, snapshot.reference)
        except (KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"expected the state of such a run, got another ({reason})") from error
        self.num_finished = snapshot.position.step
        self.has_begun = True

    def _parts(self, state: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
        name = state.get("optimizer_parts")
        if name is None:
            return {}
        from argrpo.sharded_state import read_shards

        return with_prefixes({"step.learner.update.own_rows": read_shards(folder / str(name))})

    def _load(
        self,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        reference: Mapping[str, Tensor] | None,
    ) -> None:
        if self._config.weight_ema:
            load_published_weights(self._policy, part_of(tensors, "raw"))
        if (frozen := self._learner.frozen_reference) is not None:
            if reference is None:
                raise ValueError("reference: expected the frozen one of the run, got none")
            frozen.load_state_dict(dict(reference))
        parts = part_of(tensors, "step")
        self._step.load(int(state["step"]), parts, dict(state))
        if self._evaluation is not None:
            self._evaluation.load_state_dict(part_of(tensors, "evaluation"))
        if self._best is not None:
            self._best.go_on(state["best"])
        pending = state["pending"]
        self.pending = None if pending is None else StepOutcome(**pending)
        self._random = part_of(parts, "random")
        check_random_state(self._random)
