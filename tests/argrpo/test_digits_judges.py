"""Judges: they learn, the same every time, and score images as a reward must."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from argrpo.data import Prompt
from argrpo.digits.dataset import SPLIT_SIZES, load_split
from argrpo.digits.judges import (
    HELDOUT_JUDGE,
    REWARD_JUDGE,
    DigitJudge,
    DigitJudgeReward,
    load_judge,
    save_judge,
    train_judge,
)
from argrpo.digits.training import FitConfig

# The recipe with a fifth of its steps; the whole takes seconds more and is exercised with the
# other assets.
SHORT = replace(REWARD_JUDGE, fit=FitConfig(steps=120, seed=1))


@pytest.fixture(scope="module")
def judge() -> DigitJudge:
    return train_judge(SHORT)


@pytest.fixture(scope="module")
def folder(judge: DigitJudge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judges") / "reward_judge"
    save_judge(judge, path)
    return path


def prompts(labels: list[int]) -> list[Prompt]:
    return [Prompt(text=str(label), class_id=label) for label in labels]


def test_a_fifth_of_the_recipe_reads_most_unseen_digits(judge: DigitJudge) -> None:
    digits = load_split("evaluation")
    accuracy = (judge.predict(digits.images) == digits.labels).float().mean().item()
    # Measured 0.95; the whole recipe reaches 0.98.
    assert accuracy > 0.9


def test_training_twice_gives_the_same_bits_and_leaves_the_random_state(
    judge: DigitJudge,
) -> None:
    before = torch.get_rng_state()
    again = train_judge(SHORT)
    assert torch.equal(torch.get_rng_state(), before)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, judge.state_dict()[name]), name


def test_the_two_judges_share_neither_split_nor_seed() -> None:
    splits = {REWARD_JUDGE.split, HELDOUT_JUDGE.split}
    assert splits == {"reward_judge", "heldout_judge"} <= set(SPLIT_SIZES)
    assert REWARD_JUDGE.fit.seed != HELDOUT_JUDGE.fit.seed


def test_progress_counts_every_step() -> None:
    seen: list[tuple[str, int, int]] = []
    train_judge(replace(SHORT, fit=FitConfig(steps=2)), lambda *report: seen.append(report))
    assert seen == [("reward judge", 1, 2), ("reward judge", 2, 2)]


def test_a_judge_survives_its_folder(judge: DigitJudge, folder: Path) -> None:
    images = load_split("evaluation").images[:5]
    loaded = load_judge(folder)
    assert torch.equal(loaded.logprobs(images), judge.logprobs(images))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_other_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"judge: expected a folder with config\.json"):
        load_judge(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="judge: expected model_type argrpo_digit_judge"):
        load_judge(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "argrpo_digit_judge", "width": 16}'),
        ("config.json", b'{"model_type": "argrpo_digit_judge", "width": 8, "feature_dim": 64}'),
        ("config.json", b'{"model_type": "argrpo_digit_judge", "width": "a", "feature_dim": 64}'),
        ("model.safetensors", b"cut off"),
        ("model.safetensors", None),
    ],
)
def test_a_damaged_judge_is_refused_in_one_line_with_a_remedy(
    folder: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    damaged = shutil.copytree(folder, tmp_path / "judge")
    (damaged / name).unlink()
    if content is not None:
        (damaged / name).write_bytes(content)
    said = rf"^judge: expected a whole model, got a damaged one in {damaged} .*; remove that folder"
    with pytest.raises(ValueError, match=said) as refusal:
        load_judge(damaged)
    assert "\n" not in str(refusal.value)


def test_features_and_logprobs_do_not_depend_on_the_batch(judge: DigitJudge) -> None:
    images = load_split("evaluation").images.repeat(2, 1, 1, 1)  # more than are held at a time
    features, logprobs = judge.features(images), judge.logprobs(images)
    assert features.shape == (754, judge.feature_dim)
    # Convolutions over another batch size may sum in another order.
    torch.testing.assert_close(judge.features(images[600:610]), features[600:610])
    torch.testing.assert_close(judge.logprobs(images[600:610]), logprobs[600:610])
    torch.testing.assert_close(logprobs.exp().sum(dim=1), torch.ones(754))


def test_the_reward_is_the_probability_of_the_class_asked_for(
    judge: DigitJudge, folder: Path
) -> None:
    digits = load_split("evaluation")
    images, labels = digits.images[:20], digits.labels[:20].tolist()
    scores = DigitJudgeReward(folder)(images, prompts(labels))
    assert scores.dtype == torch.float32
    chosen = judge.logprobs(images)[torch.arange(20), digits.labels[:20]]
    assert torch.equal(scores, chosen.exp())
    logprobs = DigitJudgeReward(folder, score="logprob")(images, prompts(labels))
    assert torch.equal(logprobs, chosen)
    wrong = DigitJudgeReward(folder)(images, prompts([(label + 1) % 10 for label in labels]))
    assert scores.mean() > 0.7 > 0.1 > wrong.mean()


def test_no_images_have_no_scores(folder: Path) -> None:
    assert DigitJudgeReward(folder)(torch.empty(0, 3, 32, 32), []).shape == (0,)


def test_what_a_reward_cannot_score_is_refused_by_name(folder: Path) -> None:
    reward = DigitJudgeReward(folder, name="heldout_judge")
    assert reward.name == "heldout_judge"
    image = torch.zeros(1, 3, 32, 32)
    for class_id in (None, 10, -1):
        with pytest.raises(ValueError, match=r"prompt\.class_id: expected a digit in \[0, 10\)"):
            reward(image, [Prompt(text="ten", class_id=class_id)])
    with pytest.raises(ValueError, match="prompts: expected 1, one an image, got 2"):
        reward(image, prompts([1, 2]))
    with pytest.raises(
        ValueError, match=r"images: expected \[N, 3, 32, 32\], got \[1, 3, 28, 28\]"
    ):
        reward(torch.zeros(1, 3, 28, 28), prompts([1]))
    with pytest.raises(
        FileNotFoundError, match=r"^rewards\.digits_judge\.options\.path: judge: exp"
    ):
        DigitJudgeReward("nowhere")
    with pytest.raises(ValueError, match="score: expected probability or logprob, got 'logit'"):
        DigitJudgeReward(folder, score="logit")
