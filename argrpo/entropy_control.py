"""What the reward for entropy is at each step, so that a policy neither freezes nor dissolves.

With h = entropy / ln V, the policy's mean token entropy as a share of the largest possible one:

    constant   objective.entropy_coef
    loofid     s0(p) exp(gain e) if |e| > dead_band else s0(p), within [min_coef, max_coef], where
               e = target - h and p is the share of the run that is done;
               s0 rises to base_coef, stays there, and falls along a cosine
    target     c + rate (target - h), within [min_coef, max_coef]; begins at base_coef

h is that of the step before, since a step's own entropy is known only after its update. A first
step has none: loofid then takes s0 and target base_coef. parity.entropy_by_completion measures h
during the step instead, as the released code does.

Source: loofid: Baran et al., arXiv:2603.23086; bugrabaran/ar-policy-tuning at fac5b31, grpo.py,
which takes h from each slice of a step's images during its update. target: integral control.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

Control = Literal["constant", "loofid", "target"]


@dataclass(frozen=True, kw_only=True)
class EntropyConfig:
    """How the reward for entropy follows the policy's entropy. The defaults are those of loofid as
    released."""

    control: Control = "constant"
    """constant: objective.entropy_coef, whatever the entropy; loofid: a schedule that leans against
    deviations from the target; target: moves until the entropy is on target."""

    target: float = 0.78
    """Wanted entropy as a share of ln V, the entropy of a uniform choice of token; in (0, 1)."""

    base_coef: float = 2.2e-3
    """Reward per nat on the plateau of loofid, and where target begins; above 0."""

    min_coef: float = 7e-5
    """The coefficient never falls below this; at least 0."""

    max_coef: float = 4e-3
    """The coefficient never rises above this; at least min_coef."""

    dead_band: float = 0.015
    """loofid: deviations up to this share of ln V are let pass; at least 0."""

    gain: float = 3.0
    """loofid: the coefficient grows by exp(gain * deviation); at least 0."""

    warmup_fraction: float = 0.05
    """loofid: share of the run in which the coefficient rises from 0; in [0, 1]."""

    decay_from: float = 0.85
    """loofid: share of the run after which it falls to 0; from warmup_fraction to 1."""

    rate: float = 1e-3
    """target: what a step adds per unit of deviation; above 0."""

    def __post_init__(self) -> None:
        if self.control not in get_args(Control):
            raise ValueError(
                f"entropy.control: expected constant, loofid or target, got {self.control!r}"
            )
        if not 0 < self.target < 1:
            raise ValueError(
                "entropy.target: expected a share of ln V in (0, 1), the entropy of a uniform "
                f"choice being 1, got {self.target}"
            )
        self._check_ranges()

    def _check_ranges(self) -> None:
        at_least_0 = {"min_coef": 0.0, "dead_band": 0.0, "gain": 0.0, "warmup_fraction": 0.0}
        for name, least in {
            **at_least_0,
            "max_coef": self.min_coef,
            "decay_from": self.warmup_fraction,
        }.items():
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise ValueError(
                    f"entropy.{name}: expected a finite number of at least {least}, got {value}"
                )
        for name in ("base_coef", "rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"entropy.{name}: expected a number above 0, got {getattr(self, name)}"
                )
        if self.decay_from > 1:
            raise ValueError(f"entropy.decay_from: expected at most 1, got {self.decay_from}")


class EntropyControl(Protocol):
    """Says what a step pays for entropy and hears what came of it."""

    def coefficient(self, step: int) -> float:
        """Reward per token and nat in a step, 0-based."""
        ...

    def coefficient_at(self, step: int, entropy: float) -> float:
        """The same where the policy's mean token entropy, in nats, is known in time."""
        ...

    def observe(self, entropy: float) -> None:
        """Hear the policy's mean token entropy in a step, in nats.

        Raises:
            ValueError: it is not a finite number.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


def make_entropy_control(
    config: EntropyConfig, *, constant: float, num_steps: int, vocab_size: int
) -> EntropyControl:
    """The control that a config asks for.

    Args:
        config: which, and its settings.
        constant: the coefficient where nothing is controlled.
        num_steps: of the run, for schedules.
        vocab_size: V, of which ln is the largest entropy.
    """
    if config.control == "loofid":
        return _LooFid(config, num_steps, vocab_size)
    if config.control == "target":
        return _Target(config, vocab_size)
    return _Constant(constant)


def loofid_coefficient(progress: float, share: float | None, config: EntropyConfig) -> float:
    """The released rule.

    Args:
        progress: share of the run that is done, in [0, 1].
        share: entropy as a share of ln V, in [0, 1]; None: not known, no correction.
        config: the settings.
    """
    coefficient = _scheduled(progress, config)
    if share is not None and abs(config.target - share) > config.dead_band:
        coefficient *= math.exp(config.gain * (config.target - share))
    return _clamped(coefficient, config)


def _scheduled(progress: float, config: EntropyConfig) -> float:
    if progress < config.warmup_fraction:
        return config.base_coef * progress / config.warmup_fraction
    if progress < config.decay_from or config.decay_from == 1:
        return config.base_coef
    falling = (progress - config.decay_from) / (1.0 - config.decay_from)
    return config.base_coef * 0.5 * (1.0 + math.cos(math.pi * falling))


def _clamped(coefficient: float, config: EntropyConfig) -> float:
    return min(max(coefficient, config.min_coef), config.max_coef)


class _Constant:
    def __init__(self, value: float) -> None:
        self._value = value

    def coefficient(self, step: int) -> float:
        return self._value

    def coefficient_at(self, step: int, entropy: float) -> float:
        return self._value

    def observe(self, entropy: float) -> None:
        _share(entropy, 2)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


class _LooFid:
    def __init__(self, config: EntropyConfig, num_steps: int, vocab_size: int) -> None:
        self._config = config
        self._num_steps = num_steps
        self._vocab_size = vocab_size
        self._last: float | None = None  # share of ln V

    def coefficient(self, step: int) -> float:
        return self._at(step, self._last)

    def coefficient_at(self, step: int, entropy: float) -> float:
        return self._at(step, _share(entropy, self._vocab_size))

    def observe(self, entropy: float) -> None:
        self._last = _share(entropy, self._vocab_size)

    def _at(self, step: int, share: float | None) -> float:
        return loofid_coefficient(min(step / self._num_steps, 1.0), share, self._config)

    def state_dict(self) -> dict[str, Tensor]:
        last = math.nan if self._last is None else self._last
        return {"last": torch.tensor(last, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        last = float(state["last"])
        self._last = None if math.isnan(last) else last


class _Target:
    def __init__(self, config: EntropyConfig, vocab_size: int) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._coefficient = _clamped(config.base_coef, config)

    def coefficient(self, step: int) -> float:
        return self._coefficient

    def coefficient_at(self, step: int, entropy: float) -> float:
        # It moves from step to step, whatever the entropy is within one.
        return self._coefficient

    def observe(self, entropy: float) -> None:
        # The bounds hold the sum itself: a long time off target must not pile up.
        error = self._config.target - _share(entropy, self._vocab_size)
        self._coefficient = _clamped(self._coefficient + self._config.rate * error, self._config)

    def state_dict(self) -> dict[str, Tensor]:
        return {"coefficient": torch.tensor(self._coefficient, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._coefficient = float(state["coefficient"])


def _share(entropy: float, vocab_size: int) -> float:
    """Entropy as a share of ln V, in [0, 1]; rounding may put nats a little outside."""
    if not math.isfinite(entropy):
        raise ValueError(f"entropy: expected a finite number of nats, got {entropy}")
    return min(max(entropy / math.log(vocab_size), 0.0), 1.0)
