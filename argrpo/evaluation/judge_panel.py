"""Judges that measure images and are never optimised: asking them, and who wins.

Shapes: n images of a call, M images of all, J judges.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.reward_config import RewardConfig
from argrpo.rewards.background_loop import BackgroundLoop
from argrpo.rewards.lanes import Judge
from argrpo.rewards.pool import Asking, Scoring
from argrpo.rewards.protocols import DistributionReward
from argrpo.rewards.registry import make_reward
from argrpo.rewards.sharing import SharedNetworks

SCORES = "scores"


class JudgePanel:
    """The judges of an evaluation, as something that looks at images (see image_set.py).

    Args:
        configs: of the judges; weights do nothing.
        prompts: of all images of a set, in order.
        device: where judges compute.
        cache_dir: holds the embedded models.
        deadline_s: that judges behind servers have after the last image of a batch.

    Raises:
        ValueError, FileNotFoundError: a judge that cannot be made, named under judges.
    """

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        prompts: list[Prompt],
        device: torch.device,
        *,
        cache_dir: str | None,
        deadline_s: float,
    ) -> None:
        self._judges = make_panel(configs, "judges", device, cache_dir)
        self._prompts = prompts
        self._device = device
        self._asking = Asking(BackgroundLoop(), deadline_s)
        sources = [_source_hash(config.name) for config in configs]
        asked = [[asdict(config) for config in configs], sources, [p.text for p in prompts]]
        digest = hashlib.blake2b(json.dumps(asked).encode(), digest_size=6)
        self.name = f"judges-{digest.hexdigest()}"

    @property
    def judge_names(self) -> list[str]:
        """As they are logged, in the order of the columns of scores."""
        return [judge.name for judge in self._judges]

    def __call__(self, rows: range, images: Tensor) -> dict[str, Tensor]:
        """Scores [n, J] of images [n, 3, H, W] in [0, 1]."""
        prompts = self._prompts[rows.start : rows.stop]
        images = images.to(self._device)
        return {SCORES: scores_of(self._judges, images, prompts, self._asking, "judges")}

    def close(self) -> None:
        """Let go of servers."""
        self._asking.close(self._judges)


def _source_hash(name: str) -> str | None:
    """Of the file of a judge of the caller's, module:function, which may change between two calls
    of a command that share a folder; None of a judge of ours."""
    found = re.search(r"([\w.]+):", name)
    module = None if found is None else sys.modules.get(found[1])  # iqa:NAME is of none
    file = None if module is None else module.__file__
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def make_panel(
    configs: Sequence[RewardConfig], setting: str, device: torch.device, cache_dir: str | None
) -> list[Judge]:
    """Judges that score images one by one, each under a name of its own.

    Args:
        configs: of the judges.
        setting: under which refusals name them, as eval.judges.
        device: where they compute.
        cache_dir: holds the embedded models.

    Raises:
        ValueError, FileNotFoundError: one cannot be made, scores sets of images, or shares a name.
    """
    shared = SharedNetworks()
    judges: list[Judge] = []
    for config in configs:
        try:
            judge = make_reward(config, device, cache_dir, shared)
        except (ValueError, FileNotFoundError) as error:
            kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
            raise kind(str(error).replace("rewards.", f"{setting}.", 1)) from error
        if isinstance(judge, DistributionReward):
            raise ValueError(
                f"{setting}: expected judges that score images one by one, got {judge.name}; "
                "features_path and reference measure distances between sets"
            )
        judges.append(judge)
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        raise ValueError(
            f"{setting}: expected each judge to be logged under a name of its own, got "
            f"{', '.join(names)}; give one the option name, or take it out"
        )
    return judges


@torch.no_grad()
def scores_of(
    judges: Sequence[Judge], images: Tensor, prompts: list[Prompt], asking: Asking, setting: str
) -> Tensor:
    """[n, J] fp32 on the CPU, NaN = not scored, of images [n, 3, H, W] and their prompts.

    Raises:
        ValueError: a judge returned another shape than [n], named under `setting`.
    """
    if not judges:
        return torch.empty(len(prompts), 0)
    scoring = Scoring(judges, prompts, asking)
    scoring.add(images)
    try:
        columns = [outcome.answer.scores for outcome in scoring.finish()]
    except ValueError as error:
        raise ValueError(str(error).replace("rewards.", f"{setting}.", 1)) from error
    return torch.stack(columns, dim=1)


def win_rate(scores: Tensor, base: Tensor) -> float:
    """How often a score is above that of the base, from 0 to 1.

    Args:
        scores: [M], NaN = not scored.
        base: [M], of the same seeds and conditions.

    Returns:
        A tie counts half; pairs with a score that is not finite do not count. NaN without a pair.
    """
    counted = scores.isfinite() & base.isfinite()
    wins = (scores > base).double() + 0.5 * (scores == base).double()
    return wins[counted].mean().item()


def win_rate_error(scores: Tensor, base: Tensor, groups: Tensor) -> float:
    """The standard error of a win rate, whose images of one prompt are not independent.

    Args:
        scores: [M], NaN = not scored.
        base: [M].
        groups: [M] int64, the prompt of each.

    Returns:
        The spread of the prompts' own win rates over the root of their number; NaN of fewer than
        two prompts.
    """
    rates = [win_rate(scores[groups == g], base[groups == g]) for g in torch.unique(groups)]
    known = torch.tensor([rate for rate in rates if not math.isnan(rate)])
    return (known.std() / len(known) ** 0.5).item() if len(known) > 1 else torch.nan
