"""The two tasks of `argrpo demo`: what is drawn to measure a policy, and how that is measured."""

from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from argrpo.config import TrainConfig
from argrpo.digits.assets import DigitsAssets
from argrpo.digits.dataset import NUM_CLASSES, load_split
from argrpo.digits.evaluation import DigitsScores, evaluate_digits
from argrpo.digits.judges import load_judge
from argrpo.engine.conditions import Conditions
from argrpo.model_paths import resolve_path
from argrpo.models.text_layout import text_layout
from argrpo.run_prompts import load_run_prompts

TaskName = Literal["classes", "text"]

PRESETS: dict[TaskName, str] = {"classes": "digits.yaml", "text": "digits_text.yaml"}
"""The preset of each task."""


class DemoTask(Protocol):
    """What a demo draws and measures. The first 50 images show ten digits in a row."""

    policy_path: Path  # of the base policy
    measures: tuple[str, ...]  # fields of the scores that the table at the end has
    sample_flags: str  # what `argrpo sample` draws with

    def conditions(self, num_images: int) -> Conditions:
        """Of fresh images."""
        ...

    def scores(self, images: Tensor) -> DigitsScores:
        """Of the images drawn for those conditions, [N, 3, 32, 32] in [0, 1]."""
        ...


def make_task(name: TaskName, assets: DigitsAssets, training: TrainConfig) -> DemoTask:
    """The task of a name.

    Args:
        name: classes or text.
        assets: the embedded models.
        training: the run of the demo.
    """
    return _Classes(assets) if name == "classes" else _Captions(assets, training)


class _Classes:
    """Digits by class."""

    measures: tuple[str, ...] = ("accuracy", "precision", "recall", "frechet")
    sample_flags = "--names_from digits --names seven"

    def __init__(self, assets: DigitsAssets) -> None:
        self.policy_path = assets.policy_path
        self._judge = load_judge(assets.heldout_judge_path)

    def conditions(self, num_images: int) -> Tensor:
        return torch.arange(num_images) % NUM_CLASSES

    def scores(self, images: Tensor) -> DigitsScores:
        labels = self.conditions(len(images))
        return evaluate_digits(images, labels, self._judge, load_split("evaluation"))


class _Captions:
    """Digits by caption, in the order of the captions."""

    measures: tuple[str, ...] = (
        "accuracy",
        "place",
        "tilt",
        "all_true",
        "precision",
        "recall",
        "frechet",
    )
    sample_flags = (
        '--prompts "a handwritten seven, tilted left" --text_encoder.path digits:text_encoder '
        "--text_encoder.dtype float32"
    )

    def __init__(self, assets: DigitsAssets, training: TrainConfig) -> None:
        self.policy_path = resolve_path("digits:text_policy", training.cache_dir)
        self._judge = load_judge(assets.heldout_judge_path)
        self._prompts = load_run_prompts(
            training.data,
            text_layout(self.policy_path),
            device=torch.device("cpu"),
            cache_dir=training.cache_dir,
        )

    def conditions(self, num_images: int) -> Conditions:
        prompts = self._prompts.prompts
        cycle = [prompts[row % len(prompts)] for row in range(num_images)]
        return self._prompts.conditions(cycle, 1)

    def scores(self, images: Tensor) -> DigitsScores:
        # Here, because who draws by class needs none of it.
        from argrpo.digits.text_evaluation import evaluate_captions

        prompts = self._prompts.prompts
        captions = [prompts[row % len(prompts)].text for row in range(len(images))]
        return evaluate_captions(images, captions, self._judge, load_split("evaluation"))
