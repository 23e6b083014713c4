"""The one tree of settings of a run. Frozen; refused at birth if a value is out of range.

`argrpo train --config FILE.yaml` fills it; presets stand in argrpo/configs/. A part of the tree
that has settings of its own is a record in a file named after it; what concerns several parts is
checked here.
"""

from dataclasses import dataclass, field
from typing import Literal

from argrpo.data_config import DataConfig
from argrpo.distributed_config import DistributedConfig
from argrpo.engine.sampling_params import SamplingParams
from argrpo.entropy_control import EntropyConfig
from argrpo.eval_config import EvalConfig
from argrpo.fault_config import FaultConfig
from argrpo.judging_config import JudgingConfig
from argrpo.learner_config import ParityConfig, ReferenceConfig
from argrpo.model_config import PolicyConfig, TokenizerConfig
from argrpo.objective_config import ObjectiveConfig
from argrpo.optimizer_config import OptimizerConfig
from argrpo.output_config import OutputConfig
from argrpo.profile_config import ProfileConfig
from argrpo.reward_config import AdvantageConfig, RewardConfig
from argrpo.setting_checks import at_least


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run."""

    output_dir: str
    """Folder of the run; must not hold another one, unless that is resumed."""

    policy: PolicyConfig
    """The model that is tuned."""

    tokenizer: TokenizerConfig
    """Turns its tokens into images; stays as it is."""

    rewards: list[RewardConfig]
    """Judges whose scores are optimised; at least one."""

    monitors: list[RewardConfig] = field(default_factory=list)
    """Judges that only measure, every judging.monitor_every steps, and are never optimised."""

    judging: JudgingConfig = field(default_factory=JudgingConfig)
    """How judges are asked."""

    prompts_per_step: int = 4
    """Distinct conditions a step."""

    images_per_prompt: int = 8
    """Images drawn per condition: the group that advantages compare."""

    num_steps: int = 100
    """Rollout iterations."""

    inner_epochs: int = 1
    """Passes over each rollout."""

    minibatches: int = 1
    """Optimizer steps of each pass, every one on its own images; divides the images of a step."""

    micro_batch: int = 8
    """Images per forward and backward pass; changes memory and speed, not the result."""

    gradient_checkpointing: bool = False
    """Keep only what goes into each layer and make the rest again backwards: less memory, a third
    more time in the trunk."""

    weight_ema: float | None = None
    """Share of the average of weights that stays at each step, in (0, 1); the average is what is
    shown, evaluated and saved. None averages nothing."""

    max_slots: int | None = None
    """Images drawn at a time; None draws all images of a step together."""

    kv_bytes: int | None = None
    """Bound on the bytes of keys and values; None takes what the slots need and, on a GPU, no more
    than an optimizer step leaves."""

    draw_ahead: bool = False
    """Draw the images of the next step before this one's are scored, so that judges behind servers
    have a whole step's time to answer. Images are then one step older than the policy that learns
    from them: ratios compare with the policy that drew them. Local judges work in their step's
    turn, so that on a GPU they are not overlapped with a draw any more. A run that is made longer
    by num_steps draws the first of its new steps from the policy as it is then."""

    deterministic: bool = False
    """Draw the same tokens whatever max_slots is, 8 images at a time."""

    seed: int = 0
    """Of prompts and draws."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""

    cache_dir: str | None = None
    """Where encoded texts and the embedded digits models are kept; None: argrpo under the user's
    cache folder."""

    data: DataConfig = field(default_factory=DataConfig)
    """What the images are conditioned on."""

    rollout: SamplingParams = field(default_factory=SamplingParams)
    """The distribution that tokens are drawn from."""

    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    """From scores to advantages."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What an optimizer step minimises."""

    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    """How the reward for entropy follows the policy's entropy."""

    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """The model that the KL is measured to."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How the weights move."""

    parity: ParityConfig = field(default_factory=ParityConfig)
    """Quirks of released codes."""

    eval: EvalConfig = field(default_factory=EvalConfig)
    """What is measured while the run goes on."""

    output: OutputConfig = field(default_factory=OutputConfig)
    """What the run leaves behind."""

    resume: str = "no"
    """auto: go on from the newest valid checkpoint in output_dir, or begin where there is none. The
    folder of a run or of a checkpoint: go on from that one. no: a folder with a run is refused."""

    fault: FaultConfig = field(default_factory=FaultConfig)
    """What is done about numbers that are none, and about standing still."""

    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """How several processes share the work."""

    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Which steps are traced."""

    def __post_init__(self) -> None:
        at_least("prompts_per_step", self.prompts_per_step, 1)
        if self.images_per_prompt < 2:
            raise ValueError(
                "images_per_prompt: expected at least 2 images to compare, "
                f"got {self.images_per_prompt}"
            )
        at_least("num_steps", self.num_steps, 1)
        self.profile.check_within(self.num_steps)
        at_least("inner_epochs", self.inner_epochs, 1)
        at_least("micro_batch", self.micro_batch, 1)
        if self.minibatches < 1 or self.images_per_step % self.minibatches:
            raise ValueError(
                f"minibatches: expected a divisor of the {self.images_per_step} images of a step, "
                f"got {self.minibatches}"
            )
        if self.weight_ema is not None and not 0 < self.weight_ema < 1:
            raise ValueError(
                f"weight_ema: expected None or a number in (0, 1), got {self.weight_ema}"
            )
        if self.max_slots is not None:
            at_least("max_slots", self.max_slots, 1)
        if self.kv_bytes is not None:
            at_least("kv_bytes", self.kv_bytes, 1)
        if not self.rewards:
            raise ValueError("rewards: expected at least one judge, got none")
        if not any(judge.weight for judge in self.rewards):
            raise ValueError(
                "rewards: expected at least one judge of another weight than 0, got "
                f"{', '.join(judge.name for judge in self.rewards)}, which only measure; monitors "
                "are for that"
            )
        if self.rollout.temperature == 0:
            raise ValueError(
                "rollout.temperature: expected above 0, got 0; greedy images of a prompt are all "
                "the same and leave nothing to compare"
            )
        self._check_objective()
        self._check_parity()

    def _check_objective(self) -> None:
        objective, drawn = self.objective, self.rollout
        is_guided = objective.policy == "guided"
        scores_the_draw = is_guided or not (drawn.is_guided or drawn.is_filtered)
        if objective.needs_draw_logprobs and not scores_the_draw:
            raise ValueError(
                "objective.policy: expected guided, since the log-probs of the draw enter the "
                "objective, got conditional; or draw without guidance and filters"
            )
        if self.entropy.control != "constant" and objective.entropy_coef != 0:
            raise ValueError(
                f"objective.entropy_coef: expected 0 with entropy.control {self.entropy.control}, "
                f"which sets it, got {objective.entropy_coef}"
            )
        has_cap = objective.importance_sampling_cap is not None
        if has_cap and self.keeps_old_logprobs and objective.old_logprobs == "draw":
            raise ValueError(
                "objective.importance_sampling_cap: expected none with objective.old_logprobs draw "
                "and several updates a rollout or draw_ahead, whose ratios compare with the draw "
                f"already, got {objective.importance_sampling_cap:g}; or set recomputed"
            )
        if objective.clip_components and self.advantage.aggregation == "sum_then_normalize":
            raise ValueError(
                "objective.clip_components: expected rewards that are normalised apart, got "
                f"advantage.aggregation {self.advantage.aggregation}"
            )

    def _check_parity(self) -> None:
        is_guided = self.objective.policy == "guided"
        if self.parity.entropy_by_completion and (is_guided or self.entropy.control != "loofid"):
            raise ValueError(
                "parity.entropy_by_completion: expected entropy.control loofid and "
                f"objective.policy conditional with it, got {self.entropy.control} and "
                f"{self.objective.policy}"
            )
        if self.parity.entropy_by_completion and self.prompts_per_step % self.minibatches:
            raise ValueError(
                f"minibatches: expected a divisor of the {self.prompts_per_step} prompts with "
                f"parity.entropy_by_completion, got {self.minibatches}"
            )
        is_summed = self.advantage.aggregation == "sum_then_normalize"
        if self.parity.weights_before_normalization and is_summed:
            raise ValueError(
                "parity.weights_before_normalization: expected false with advantage.aggregation "
                "sum_then_normalize, which weighs rewards before they are normalised anyway, got "
                "true"
            )
        if self.parity.bf16_masters and self.policy.dtype != "bfloat16":
            raise ValueError(
                "parity.bf16_masters: expected policy.dtype bfloat16 with it, got "
                f"{self.policy.dtype}"
            )
        if self.parity.first_token_mask and is_guided:
            raise ValueError(
                "parity.first_token_mask: expected false with objective.policy guided, which "
                "scores what was drawn, got true"
            )
        if self.parity.label_dropout and is_guided:
            raise ValueError(
                "parity.label_dropout: expected 0 with objective.policy guided, got "
                f"{self.parity.label_dropout}"
            )

    @property
    def images_per_step(self) -> int:
        return self.prompts_per_step * self.images_per_prompt

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps on each rollout."""
        return self.inner_epochs * self.minibatches

    @property
    def keeps_old_logprobs(self) -> bool:
        """Whether the policy moves between a draw and the last update that learns from it."""
        return self.updates_per_step > 1 or self.draw_ahead


def describe(config: TrainConfig) -> list[str]:
    """What follows from the two knobs, in words; printed before the first step."""
    minibatch = config.images_per_step // config.minibatches
    micro_steps = -(-minibatch // config.micro_batch)
    slots = config.max_slots or config.images_per_step
    total = config.num_steps * config.images_per_step
    return [
        f"{config.prompts_per_step} prompts x {config.images_per_prompt} images = "
        f"{config.images_per_step} images a step, drawn {min(slots, config.images_per_step)} "
        "at a time",
        f"{config.updates_per_step} optimizer step(s) a rollout, each over {micro_steps} "
        f"micro-batch(es) of {min(config.micro_batch, minibatch)}",
        f"{config.num_steps} steps, {total} images in all",
        *_describe_eval(config),
    ]


def _describe_eval(config: TrainConfig) -> list[str]:
    settings = config.eval
    if not settings.is_on:
        return []
    count = sum(settings.is_due(step, config.num_steps) for step in range(config.num_steps + 1))
    scales = settings.guidance_scales or [config.rollout.guidance_scale]
    return [
        f"{count} evaluation(s) of {settings.num_images} images at guidance "
        f"{', '.join(f'{scale:g}' for scale in scales)}, one of them before the first step"
    ]
