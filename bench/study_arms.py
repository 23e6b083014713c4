"""The arms of the learning study: what each trains on the embedded digits, and by what.

    base            the embedded policy as it is
    judge           AR-GRPO's objective, a judge's probability as the reward, drawn with guidance
    judge_loofid    the same, and LOO-FID and the reward for entropy that follows the entropy
    guided          judge, but the policy scored is the one that drew (objective.policy guided)
    cfg_free        judge_loofid, drawn without guidance
    likelihood      no reward: more of the training that made the base, for as much compute

One setting for all: only what the lines above name differs between two arms.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argrpo.config import (
    AdvantageConfig,
    DataConfig,
    OptimizerConfig,
    OutputConfig,
    PolicyConfig,
    RewardConfig,
    TokenizerConfig,
    TrainConfig,
)
from argrpo.data import Prompt
from argrpo.digits.assets import DigitsAssets
from argrpo.digits.base_policy import next_token_loss
from argrpo.digits.dataset import NUM_CLASSES, load_split, shift_and_rotate
from argrpo.digits.judges import load_judge
from argrpo.digits.training import FitConfig, fit
from argrpo.engine.sampling_params import SamplingParams
from argrpo.entropy_control import EntropyConfig
from argrpo.models.llamagen import LlamaGen
from argrpo.models.loading import load_policy, load_tokenizer
from argrpo.models.vq import VQTokenizer
from argrpo.objective_config import ObjectiveConfig
from argrpo.run_folder import RunFolder
from argrpo.schedules import LearningRateConfig
from argrpo.trainer import Trainer

ARMS = ("base", "judge", "judge_loofid", "guided", "cfg_free", "likelihood")
WITH_LOOFID = ("judge_loofid", "cfg_free")
CURVES = {
    "reward": "rewards/digits_judge/mean",
    "heldout_accuracy": "rewards/heldout_accuracy/mean",
    "kl": "kl",
    "entropy_policy": "entropy/policy",
    "entropy_coef": "entropy/coef",
}
"""What a row keeps of every step, by its name in the log."""

GUIDANCE = 2.0
BETA = 0.1
"""As AR-GRPO published it for classes."""

VIEWS = 8
"""Times that the control sees each real digit moved and turned in another way."""

_PASSES = 2
"""Images of maximum likelihood for each image drawn: a guided draw is two passes, the reference
one, and an update three, in the control as in the others. The seconds of all are in the rows."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training and its measurement."""

    arm: str
    seed: int
    loo_fid_weight: float = 0.0
    """Of arms with LOO-FID, after normalisation, against 1 for the judge."""

    steps: int = 56
    beta: float = BETA
    """Weight of the KL to the base."""

    group: int = 8
    """Images of each digit in a step; every digit comes once a step."""

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise ValueError(f"arm: expected one of {', '.join(ARMS)}, got {self.arm!r}")
        if self.loo_fid_weight and self.arm not in WITH_LOOFID:
            raise ValueError(
                f"loo_fid_weight: expected 0 for {self.arm}, got {self.loo_fid_weight:g}"
            )

    @property
    def images(self) -> int:
        """Drawn in all; the budget that all arms share."""
        return self.steps * self.group * NUM_CLASSES


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What a job left."""

    policy: LlamaGen
    seconds: float
    curves: dict[str, list[float]] = field(default_factory=dict)


class HeldoutAccuracy:
    """1 where the judge at `path` sees the digit asked for, else 0; with weight 0 it measures."""

    name = "heldout_accuracy"

    def __init__(self, path: str | Path) -> None:
        self._judge = load_judge(path)

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """[N, 3, 32, 32] in [0, 1] and N prompts with a class_id -> [N] fp32."""
        class_ids = torch.tensor([prompt.class_id for prompt in prompts])
        return (self._judge.predict(images.cpu()) == class_ids).float()


class CurveTracker:
    """Keeps the curves of a run in memory, as {name: one number a step}."""

    def __init__(self) -> None:
        self.curves: dict[str, list[float]] = {name: [] for name in CURVES}

    def start(self, config: TrainConfig, folder: RunFolder, logged: int | None = None) -> None:
        """Nothing to prepare."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, logged in CURVES.items():
            self.curves[name].append(round(metrics[logged], 5))

    def image(self, step: int, name: str, path: Path) -> None:
        """Pictures are not kept."""

    def close(self) -> None:
        """Nothing to close."""


def train(job: Job, assets: DigitsAssets, folder: Path) -> Trained:
    """Train one arm.

    Args:
        job: which, and for how long.
        assets: the embedded models.
        folder: of the run, not there yet.
    """
    started = time.monotonic()
    if job.arm == "base":
        return Trained(load_policy(assets.policy_path), 0.0)
    if job.arm == "likelihood":
        policy = more_likelihood(
            load_policy(assets.policy_path),
            load_tokenizer(assets.tokenizer_path),
            images=_PASSES * job.images,
            seed=job.seed,
        )
        return Trained(policy, time.monotonic() - started)
    tracker = CurveTracker()
    trainer = Trainer(train_config(job, assets, folder), [tracker])
    trainer.train()
    return Trained(trainer.policy, time.monotonic() - started, tracker.curves)


def train_config(job: Job, assets: DigitsAssets, folder: Path) -> TrainConfig:
    """The run of an arm that draws."""
    has_loofid = job.arm in WITH_LOOFID
    drawn = SamplingParams(guidance_scale=1.0 if job.arm == "cfg_free" else GUIDANCE)
    # Adaptive entropy as released; its target is where the base is, 2.89 of ln 256 = 5.55 nats.
    entropy = EntropyConfig(control="loofid", target=0.52) if has_loofid else EntropyConfig()
    return TrainConfig(
        output_dir=str(folder),
        policy=PolicyConfig(path=str(assets.policy_path), downsample=4),
        tokenizer=TokenizerConfig(path=str(assets.tokenizer_path), decode_batch=128),
        data=DataConfig(names="digits"),
        rewards=_rewards(job, assets),
        prompts_per_step=NUM_CLASSES,
        images_per_prompt=job.group,
        num_steps=job.steps,
        micro_batch=40,
        seed=job.seed,
        device="cpu",
        rollout=drawn,
        advantage=AdvantageConfig(aggregation="normalize_kinds_then_sum"),
        objective=ObjectiveConfig(
            policy="guided" if job.arm == "guided" else "conditional", beta=job.beta
        ),
        entropy=entropy,
        optimizer=OptimizerConfig(
            learning_rate=LearningRateConfig(
                peak=3e-4, warmup_steps=8, schedule="cosine", final_fraction=0.1
            )
        ),
        output=OutputConfig(sample_every=0, sample_images=1, save_every=0, trackers=[]),
    )


def more_likelihood(
    policy: LlamaGen, tokenizer: VQTokenizer, *, images: int, seed: int
) -> LlamaGen:
    """The base's own training on its own split, gone on with: new augmented views, same rates.

    Args:
        policy: where it begins; trained in place.
        tokenizer: turns the views into tokens.
        images: shown in all, in batches of 32.
        seed: of views, batches and dropped labels.
    """
    generator = torch.Generator().manual_seed(1_000 + seed)
    digits = load_split("policy")
    views = [digits.images] + [
        shift_and_rotate(digits.images, generator, max_shift=2.0, max_degrees=5.0).clamp_(0.0, 1.0)
        for _ in range(VIEWS - 1)
    ]
    token_ids = torch.cat([tokenizer.encode(view) for view in views])
    labels = digits.labels.repeat(len(views))
    config = FitConfig(steps=max(1, images // 32), batch_size=32, lr=2e-3)
    policy.requires_grad_(True)

    def loss_of_step(step: int) -> Tensor:
        rows = torch.randint(len(labels), (config.batch_size,), generator=generator)
        is_null = torch.rand(len(rows), generator=generator) < 0.1
        conditions = labels[rows].masked_fill(is_null, NUM_CLASSES)
        return next_token_loss(policy, conditions, token_ids[rows])

    fit("likelihood", policy.parameters(), loss_of_step, config)
    return policy.requires_grad_(False)


def _rewards(job: Job, assets: DigitsAssets) -> list[RewardConfig]:
    judge = _judge("digits_judge", 1.0, {"path": str(assets.reward_judge_path)})
    watcher = {"path": str(assets.heldout_judge_path)}
    rewards = [judge, _judge("study_arms:HeldoutAccuracy", 0.0, watcher)]
    if job.loo_fid_weight:
        options = {
            "features": "digits_judge",
            # Never the held-out judge's features, by which the arms are compared.
            "features_path": str(assets.reward_judge_path),
            "reference": "dataset:digits/policy",
        }
        rewards.append(_judge("loo_fid", job.loo_fid_weight, options))
    return rewards


def _judge(name: str, weight: float, options: Mapping[str, Any]) -> RewardConfig:
    return RewardConfig(name=name, weight=weight, options=dict(options))
