"""Judges of digits: small convolutional classifiers, one the reward, one that only measures.

The two learn from different splits and different seeds, so what pleases the first for reasons of
its own does not please the second.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from argrpo.data import Prompt
from argrpo.digits.dataset import IMAGE_SIZE, NUM_CLASSES, load_split, shift_and_rotate
from argrpo.digits.training import FitConfig, Progress, fit, no_progress, seeded_init
from argrpo.model_paths import blamed_on

_ROWS = 512  # images in a judge at a time when it only looks
_MODEL_TYPE = "argrpo_digit_judge"
_OPTIONS = "rewards.digits_judge.options"


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Sizes of a judge and how it learns."""

    split: str
    """The split that it learns from."""

    fit: FitConfig
    """How long and how fast."""

    width: int = 16
    """Channels of the first convolution; the others have twice as many."""

    feature_dim: int = 64
    """Length of the feature vector below the logits."""

    max_shift: float = 2.5
    """Augmentation: largest shift, in pixels."""

    max_degrees: float = 12.0
    """Augmentation: largest turn, in degrees."""

    label_smoothing: float = 0.0
    """Share of the target spread evenly over the classes."""


REWARD_JUDGE = JudgeConfig(split="reward_judge", fit=FitConfig(steps=600, seed=1))
HELDOUT_JUDGE = JudgeConfig(split="heldout_judge", fit=FitConfig(steps=600, seed=2))


class DigitJudge(nn.Module):
    """A classifier of 32 x 32 digits.

    Args:
        width: channels of the first convolution.
        feature_dim: length of the feature vector.
    """

    def __init__(self, width: int = 16, feature_dim: int = 64) -> None:
        super().__init__()
        self.width = width
        self.feature_dim = feature_dim
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(2 * width * (IMAGE_SIZE // 8) ** 2, feature_dim),
            nn.GELU(),
        )
        self.head = nn.Linear(feature_dim, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 3, 32, 32] in [0, 1]."""
        return self.head(self.trunk(images))

    @torch.no_grad()
    def logprobs(self, images: Tensor) -> Tensor:
        """Log-probabilities of the classes.

        Args:
            images: [N, 3, 32, 32] floating point in [0, 1], any device.

        Returns:
            [N, 10] fp32, on the device of `images`.

        Raises:
            ValueError: the shape is not as above.
        """
        features = self.features(images)
        logits = self.head(features.to(self.head.weight))
        return F.log_softmax(logits.float(), dim=-1).to(images.device)

    def predict(self, images: Tensor) -> Tensor:
        """Classes [N] int64 of images [N, 3, 32, 32] in [0, 1]."""
        return self.logprobs(images).argmax(dim=-1)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What the judge sees below its logits, for distances between sets of images.

        Args:
            images: [N, 3, 32, 32] floating point in [0, 1], any device.

        Returns:
            [N, feature_dim] fp32, on the device of `images`.

        Raises:
            ValueError: the shape is not as above.
        """
        if tuple(images.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"images: expected [N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], got {list(images.shape)}"
            )
        pieces = [self.trunk(rows.to(self.head.weight)) for rows in images.split(_ROWS)]
        return torch.cat(pieces).to(images.device, torch.float32)


def train_judge(config: JudgeConfig, progress: Progress = no_progress) -> DigitJudge:
    """A judge trained on its own split, the same every time on one machine."""
    digits = load_split(config.split)
    generator = torch.Generator().manual_seed(config.fit.seed)
    with seeded_init(config.fit.seed):
        judge = DigitJudge(config.width, config.feature_dim)

    def loss_of_step(step: int) -> Tensor:
        rows = torch.randint(len(digits), (config.fit.batch_size,), generator=generator)
        images = shift_and_rotate(
            digits.images[rows],
            generator,
            max_shift=config.max_shift,
            max_degrees=config.max_degrees,
        )
        return F.cross_entropy(
            judge(images), digits.labels[rows], label_smoothing=config.label_smoothing
        )

    fit(config.split.replace("_", " "), judge.parameters(), loss_of_step, config.fit, progress)
    return judge.requires_grad_(False)


def save_judge(judge: DigitJudge, folder: Path) -> None:
    """Write a judge as model.safetensors and config.json into a folder, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": _MODEL_TYPE, "width": judge.width, "feature_dim": judge.feature_dim}
    save_file(judge.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_judge(folder: str | Path, *, device: str | torch.device = "cpu") -> DigitJudge:
    """A judge from the folder that `save_judge` wrote, frozen.

    Raises:
        FileNotFoundError: there is no config.json in the folder.
        ValueError: the folder holds another model, or a damaged one.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"judge: expected a folder with config.json, got {folder}")
    try:
        config = json.loads(path.read_text())
        model_type = config.get("model_type")
    except (ValueError, AttributeError) as error:
        raise _damaged(folder, error) from error
    if model_type != _MODEL_TYPE:
        raise ValueError(f"judge: expected model_type {_MODEL_TYPE} in {path}, got {model_type!r}")
    try:
        judge = DigitJudge(config["width"], config["feature_dim"])
        judge.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    # A key, a size or the file is missing, cut off, or belongs to another judge.
    except (LookupError, TypeError, RuntimeError, OSError, SafetensorError) as error:
        raise _damaged(folder, error) from error
    return judge.requires_grad_(False).to(device)


def _damaged(folder: str | Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(
        f"judge: expected a whole model, got a damaged one in {folder} ({reason[:200]}); remove "
        "that folder, and an embedded judge is trained again"
    )


class DigitJudgeReward:
    """How sure a judge is that an image shows the digit that its prompt asks for.

    The probability is bounded, so one hopeless image cannot outweigh its whole group; the
    log-probability tells bad images from worse ones.

    Args:
        path: folder of the judge.
        score: "probability" in [0, 1], or "logprob" up to 0.
        name: under which its scores are logged.
        device: where the judge computes.

    Raises:
        ValueError: `score` is neither, or the folder holds another model.
        FileNotFoundError: there is no judge in the folder.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        score: str = "probability",
        name: str = "digits_judge",
        device: str | torch.device = "cpu",
    ) -> None:
        if score not in ("probability", "logprob"):
            raise ValueError(f"{_OPTIONS}.score: expected probability or logprob, got {score!r}")
        self.name = name
        with blamed_on(f"{_OPTIONS}.path"):
            self._judge = load_judge(path, device=device)
        self._score = score

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """Scores of images.

        Args:
            images: [N, 3, 32, 32] floating point in [0, 1].
            prompts: N of them, each with a class_id.

        Returns:
            [N] fp32, on the device of `images`.

        Raises:
            ValueError: a prompt has no class_id in [0, 10), or the counts differ.
        """
        if len(prompts) != len(images):
            raise ValueError(f"prompts: expected {len(images)}, one an image, got {len(prompts)}")
        class_ids = torch.tensor([_class_of(prompt) for prompt in prompts], dtype=torch.int64)
        logprobs = self._judge.logprobs(images)
        chosen = logprobs.gather(1, class_ids.to(logprobs.device)[:, None]).squeeze(1)
        return chosen if self._score == "logprob" else chosen.exp()


def _class_of(prompt: Prompt) -> int:
    if prompt.class_id is None or not 0 <= prompt.class_id < NUM_CLASSES:
        raise ValueError(
            f"prompt.class_id: expected a digit in [0, {NUM_CLASSES}), got {prompt.class_id}"
        )
    return prompt.class_id
