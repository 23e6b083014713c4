"""GRPO: draw images, let judges score them, compare within groups, move the policy.

    conditions -> engine.draw -> tokens -> tokenizer.decode -> images -> rewards
               -> advantages per group -> objective on log-probs -> optimizer -> next draw

The optimizer writes the very weights that the engine reads, so nothing is copied between a step
and the next draw.

Source: Shao et al., arXiv:2402.03300 (GRPO); the recipe of AR-GRPO, arXiv:2508.06924: the log-probs
of policy and reference are those of the conditional model, whatever guidance drew the tokens.
"""

import copy
import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.config import TrainConfig
from argrpo.data import Prompt, load_prompts
from argrpo.engine.conditions import select
from argrpo.engine.rollout import Rollout
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.image_files import save_grid
from argrpo.kernels.token_logprobs import TokenLogprobs, token_logprobs
from argrpo.loss_metrics import LossMetrics
from argrpo.model_paths import resolve_path
from argrpo.models.llamagen import LlamaGen
from argrpo.models.loading import load_policy, load_tokenizer, save_policy
from argrpo.models.vq import VQTokenizer
from argrpo.objectives import LossScale, policy_loss
from argrpo.optimizer import MasterAdamW
from argrpo.pixels import seen_by_judges
from argrpo.rewards.scoring import Judges, Scores
from argrpo.run_folder import RunFolder
from argrpo.schedules import learning_rate
from argrpo.step_clock import StepClock
from argrpo.trackers import Tracker, make_trackers

_LOG = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class NonFiniteError(RuntimeError):
    """A gradient is not a finite number; the weights are those of the step before."""


class TrainResult(NamedTuple):
    """What is left when a run ends."""

    policy_path: Path  # the folder of the tuned policy, for load_policy
    metrics: dict[str, float]  # of the last step


@dataclass(frozen=True, slots=True, eq=False)
class _Experience:
    """One step's images, ready to be learned from."""

    rollout: Rollout
    advantages: Tensor  # [N] fp32
    old_logprobs: Tensor | None  # [N, T] fp32; None: those of the forward pass itself
    ref_logprobs: Tensor | None  # [N, T] fp32


class _MicroBatch(NamedTuple):
    logprobs: Tensor  # [m, T] fp32, detached
    metrics: LossMetrics


class Trainer:
    """One run. Building it checks everything that can be checked before the first step."""

    def __init__(self, config: TrainConfig, trackers: Sequence[Tracker] | None = None) -> None:
        """Load the models and the judges.

        Args:
            config: the run.
            trackers: who is told about each step; None: those that the config names.

        Raises:
            ValueError: a file or a setting that does not fit the others, or an output folder that
                holds another run, named.
            FileNotFoundError: a path that is not there.
        """
        self.config = config
        self._device = choose_device(config.device)
        self._trackers = make_trackers(config, progress=False) if trackers is None else trackers
        self._optimizer_steps = 0
        self._clock = StepClock(self._device)
        # First, so that a taken folder is known before minutes go into loading models.
        self._folder = RunFolder.create(config.output_dir)
        try:
            self._load()
        except Exception:
            self._folder.discard_if_empty()
            raise

    def _load(self) -> None:
        config = self.config
        self.policy = load_policy(
            resolve_path(config.policy.path, config.cache_dir),
            image_size=config.policy.image_size,
            num_heads=config.policy.num_heads,
            downsample=config.policy.downsample,
            device=self._device,
            dtype=_DTYPES[config.policy.dtype],
        )
        self._tokenizer = load_tokenizer(
            resolve_path(config.tokenizer.path, config.cache_dir),
            device=self._device,
            dtype=_DTYPES[config.tokenizer.dtype],
        )
        _check_fit(self.policy, self._tokenizer)
        self._prompts = load_prompts(config.data)
        self._judges = Judges(config, self._device)
        self._reference = _frozen_copy(self.policy) if config.objective.beta > 0 else None
        slots = min(config.max_slots or config.images_per_step, config.images_per_step)
        self.engine = RolloutEngine(self.policy, max_slots=slots)
        self._optimizer = MasterAdamW(
            self.policy.named_parameters(),
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            max_grad_norm=config.optimizer.max_grad_norm,
        )

    def train(self) -> TrainResult:
        """Run all steps.

        Raises:
            NonFiniteError: a loss or gradient stopped being a number.
        """
        self._warn_of_mismatch()
        for tracker in self._trackers:
            tracker.start(self.config, self._folder)
        metrics: dict[str, float] = {}
        try:
            self._show_samples(0)
            for step in range(self.config.num_steps):
                metrics = self._train_step(step)
                for tracker in self._trackers:
                    tracker.log(step + 1, metrics)
                self._leave_files(step + 1)
        finally:
            for tracker in self._trackers:
                tracker.close()
        return TrainResult(self._folder.checkpoint(self.config.num_steps), metrics)

    def _train_step(self, step: int) -> dict[str, float]:
        """One rollout iteration: the whole method in ten lines."""
        self._clock.start_step()
        prompts = self._prompts.draw(self.config.prompts_per_step, self.config.seed, step)
        rollout = self._draw(prompts, step)
        images = self._decode(rollout)
        scores = self._score(images, prompts, step)
        advantages = scores.advantages(self.config.images_per_prompt)
        experience = self._prepare(rollout, advantages.values.flatten())
        learned = self._learn(experience, step)
        return {
            **scores.metrics(),
            **advantages.metrics(),
            **learned,
            "entropy/draw": rollout.entropies.mean().item(),
            "optimizer_step": float(self._optimizer_steps),
            **self._clock.finish_step(len(rollout), rollout.token_ids.numel()),
        }

    def _draw(self, prompts: list[Prompt], step: int) -> Rollout:
        with self._clock.phase("rollout"):
            conditions = self._prompts.conditions(prompts, self.config.images_per_prompt)
            seed = draw_seed(self.config.seed, step)
            return self.engine.draw(conditions, self.config.rollout, seed=seed)

    def _decode(self, rollout: Rollout) -> Tensor:
        with self._clock.phase("decode"):
            return self._pixels(rollout)

    def _pixels(self, rollout: Rollout) -> Tensor:
        batch = self.config.tokenizer.decode_batch
        return self._tokenizer.decode(rollout.token_ids, decode_batch=batch)

    def _score(self, images: Tensor, prompts: list[Prompt], step: int) -> Scores:
        with self._clock.phase("reward"):
            repeated = [p for p in prompts for _ in range(self.config.images_per_prompt)]
            seen = seen_by_judges(images, self.config.tokenizer.pixels)
            return self._judges.score(seen, repeated, with_monitors=self._is_shown(step + 1))

    @torch.no_grad()
    def _prepare(self, rollout: Rollout, advantages: Tensor) -> _Experience:
        """Log-probs that stay fixed while the policy moves."""
        with self._clock.phase("logprob"):
            reference = None
            if self._reference is not None:
                reference = self._all_logprobs(self._reference, rollout)
            old = None
            if self.config.inner_epochs > 1:
                old = self._all_logprobs(self.policy, rollout)
            return _Experience(rollout, advantages.to(self._device), old, reference)

    def _all_logprobs(self, policy: LlamaGen, rollout: Rollout) -> Tensor:
        temperature = rollout.params.temperature
        parts = [
            _scored_tokens(policy, rollout, rows, temperature).logprobs
            for rows in self._micro_batches()
        ]
        return torch.cat(parts).view(rollout.token_ids.shape)

    def _learn(self, experience: _Experience, step: int) -> dict[str, float]:
        """One optimizer step per inner epoch on the same images; reports the last."""
        with self._clock.phase("update"):
            for epoch in range(self.config.inner_epochs):
                losses = [self._accumulate(experience, rows) for rows in self._micro_batches()]
                if epoch == 0:
                    first = losses
                grad_norm = self._step_optimizer(step)
            metrics = losses[0].metrics
            for loss in losses[1:]:
                metrics = metrics.merged(loss.metrics)
            return {
                **metrics.named(entropy_name=self._entropy_name),
                **self._draw_mismatch(experience.rollout, first),
                "grad_norm": grad_norm,
                "learning_rate": self._learning_rate(step),
            }

    def _accumulate(self, experience: _Experience, rows: Tensor) -> _MicroBatch:
        """Forward and backward of some images; their gradient adds to that of the step."""
        rollout, config = experience.rollout, self.config
        shape = (len(rows), rollout.token_ids.shape[1])
        scores = _scored_tokens(self.policy, rollout, rows, config.rollout.temperature)
        logprobs = scores.logprobs.view(shape)
        loss = policy_loss(
            logprobs,
            experience.advantages[rows],
            config=config.objective,
            scale=LossScale(len(rollout), rollout.token_ids.numel(), shape[1]),
            old_logprobs=_rows(experience.old_logprobs, rows),
            ref_logprobs=_rows(experience.ref_logprobs, rows),
            entropies=scores.entropies.view(shape),
        )
        loss.loss.backward()
        self._optimizer.accumulate()
        return _MicroBatch(logprobs.detach(), loss.metrics)

    def _step_optimizer(self, step: int) -> float:
        grad_norm = float(self._optimizer.step(self._learning_rate(step)))
        if not math.isfinite(grad_norm):
            raise NonFiniteError(
                f"grad_norm: expected a finite number at step {step + 1}, got {grad_norm}; the "
                "weights were left as they were. Lower the learning rate, or look at the rewards "
                "in metrics.jsonl"
            )
        self._optimizer_steps += 1
        return grad_norm

    def _learning_rate(self, step: int) -> float:
        config = self.config.optimizer.learning_rate
        return learning_rate(step, config, num_steps=self.config.num_steps)

    @property
    def _entropy_name(self) -> str:
        # entropy/policy is at temperature 1 by definition; a tempered one goes by another name.
        return "entropy/policy" if self.config.rollout.temperature == 1 else "entropy/tempered"

    def _draw_mismatch(self, rollout: Rollout, first: list[_MicroBatch]) -> dict[str, float]:
        """How far the log-probs that were trained on lie from those of the draw."""
        trained = torch.cat([part.logprobs for part in first])
        difference = (trained - rollout.logprobs).abs()
        mean, largest = torch.stack([difference.mean(), difference.max()]).tolist()
        return {
            "sampling/sampling_logp_difference/mean": mean,
            "sampling/sampling_logp_difference/max": largest,
        }

    def _micro_batches(self) -> Iterator[Tensor]:
        rows = torch.arange(self.config.images_per_step, device=self._device)
        yield from rows.split(self.config.micro_batch)

    def _is_shown(self, step: int) -> bool:
        every = self.config.output.sample_every
        return step == self.config.num_steps or (every > 0 and step % every == 0)

    def _leave_files(self, step: int) -> None:
        last = step == self.config.num_steps
        every = self.config.output.save_every
        if self._is_shown(step):
            self._show_samples(step)
        if last or (every and step % every == 0):
            save_policy(self.policy, self._folder.checkpoint(step))

    def _show_samples(self, step: int) -> None:
        """A grid of the same conditions and seeds every time."""
        count = self.config.output.sample_images
        cycle = [self._prompts.prompts[i % len(self._prompts)] for i in range(count)]
        rollout = self.engine.draw(
            self._prompts.conditions(cycle, 1), self.config.rollout, seed=self.config.seed
        )
        path = self._folder.samples(step)
        save_grid(self._pixels(rollout), path)
        for tracker in self._trackers:
            tracker.image(step, "samples", path)

    def _warn_of_mismatch(self) -> None:
        params = self.config.rollout
        if params.is_guided or params.is_filtered:
            _LOG.warning(
                "tokens are drawn with guidance %g, top_k %d, top_p %g but scored by the "
                "conditional model alone, as the published recipe does; the gap is logged as "
                "sampling/sampling_logp_difference",
                params.guidance_scale,
                params.top_k,
                params.top_p,
            )


def choose_device(name: str) -> torch.device:
    """auto takes a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA GPU, got none; use --device cpu")
    return torch.device(name)


def draw_seed(run_seed: int, step: int) -> int:
    """The seed of a step's draw: 64 bits hashed from the run's seed and the step."""
    digest = hashlib.blake2b(f"draw {run_seed} {step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _scored_tokens(
    policy: LlamaGen, rollout: Rollout, rows: Tensor, temperature: float
) -> TokenLogprobs:
    """[m * T] log-probs and entropies of some images under the conditional model.

    At the draw's temperature and over the whole codebook, without guidance.
    """
    token_ids = rollout.token_ids[rows]
    hidden = policy.hidden(select(rollout.conditions, rows), token_ids).flatten(0, 1)
    return token_logprobs(hidden, policy.head_weight, token_ids.flatten(), temperature)


def _rows(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values[rows]


def _frozen_copy(policy: LlamaGen) -> LlamaGen:
    """The policy as it is now, apart from it: a child module would be trained and saved too."""
    return copy.deepcopy(policy).requires_grad_(False)


def _check_fit(policy: LlamaGen, tokenizer: VQTokenizer) -> None:
    """A policy and a tokenizer that speak of the same codes and the same pixels."""
    codes = tokenizer.config.codebook_size
    if codes != policy.config.vocab_size:
        raise ValueError(
            f"tokenizer.path: expected a codebook of {policy.config.vocab_size}, as the policy "
            f"has, got {codes}"
        )
    if tokenizer.downsample != policy.config.downsample:
        raise ValueError(
            f"policy.downsample: expected {tokenizer.downsample}, as the tokenizer has, "
            f"got {policy.config.downsample}"
        )
