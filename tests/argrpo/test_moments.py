"""`argrpo moments`: from a folder of images to a file that the reward reads."""

from pathlib import Path

import pytest
import torch

from argrpo.cli import main
from argrpo.config_files import parse_config
from argrpo.digits.dataset import load_split
from argrpo.digits.judges import DigitJudge, load_judge, save_judge
from argrpo.evaluation.moment_files import load_moments
from argrpo.evaluation.moments import moments_of
from argrpo.image_files import save_grid, save_image
from argrpo.moments import MomentsConfig, write_moments
from argrpo.rewards.loo_fid import LooFidReward


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    save_judge(DigitJudge(width=4, feature_dim=6), folder)
    return folder


def _config(tmp_path: Path, judge: Path, **settings: object) -> MomentsConfig:
    given = {"images": "dataset:digits/policy", "output": str(tmp_path / "m.npz")}
    given |= {"features": "digits_judge", "features_path": str(judge), "device": "cpu"}
    return MomentsConfig(**{**given, **settings})


def test_what_the_command_writes_the_reward_reads(
    judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = load_split("evaluation").images[:20]
    folder = tmp_path / "images"
    for row, image in enumerate(images):
        save_image(image, folder / f"{row:05d}.png", pixels="round")
    save_grid(images, folder / "grid.png")  # as argrpo sample leaves one
    words = ["--images", folder, "--features", "digits_judge", "--features_path", judge]
    words += ["--output", tmp_path / "m.npz", "--device", "cpu", "--batch", "7"]
    assert main(["moments", *map(str, words)]) == 0
    assert "m.npz: 20 images, 6 features" in capsys.readouterr().out
    found = load_moments(tmp_path / "m.npz")
    wanted = moments_of(load_judge(judge).features((images * 255).round() / 255))
    # the same pixels; 7 images at a time round otherwise than 20
    torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-5, atol=1e-7)
    LooFidReward(
        str(tmp_path / "m.npz"),
        str(judge),
        features="digits_judge",
        form="full",
        initial=str(tmp_path / "m.npz"),
        device=torch.device("cpu"),
    )


def test_progress_is_told(judge: Path, tmp_path: Path) -> None:
    for row, image in enumerate(load_split("evaluation").images[:5]):
        save_image(image, tmp_path / "images" / f"{row}.png")
    told: list[tuple[str, int, int]] = []
    config = _config(tmp_path, judge, images=str(tmp_path / "images"), batch=2)
    write_moments(config, lambda *words: told.append(words))
    assert told == [("features", 2, 5), ("features", 4, 5), ("features", 5, 5)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"image_size": 0}, "image_size: expected at least 1, got 0"),
        ({"output": "moments.pt"}, r"output: expected a name that ends in \.npz, got moments\.pt"),
    ],
)
def test_settings_that_cannot_be_are_named(
    judge: Path, tmp_path: Path, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _config(tmp_path, judge, **settings)


def test_a_file_that_stands_is_kept(judge: Path, tmp_path: Path) -> None:
    (tmp_path / "m.npz").write_bytes(b"precious")
    with pytest.raises(ValueError, match="output: expected a file that is not there yet, got"):
        _config(tmp_path, judge)
    assert (tmp_path / "m.npz").read_bytes() == b"precious"


def test_images_that_are_not_there_are_blamed_on_their_setting(judge: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="images: expected an npz file or a folder of imag"):
        write_moments(_config(tmp_path, judge, images=str(tmp_path / "none")))


def test_the_settings_are_flags(judge: Path, tmp_path: Path) -> None:
    words = ["--images", "a", "--output", str(tmp_path / "b.npz"), "--features_path", "c"]
    config = parse_config(MomentsConfig, words, command="argrpo moments", lists={})
    assert (config.features, config.batch, config.image_size) == ("inception", 64, None)
