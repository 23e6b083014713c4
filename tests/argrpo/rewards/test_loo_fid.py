"""The leave-one-out reward on small judges' features: state, ranks, refusals."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from argrpo.data import Prompt
from argrpo.digits.dataset import load_split
from argrpo.digits.judges import DigitJudge, load_judge, save_judge
from argrpo.evaluation.frechet import frechet_distance
from argrpo.evaluation.moment_files import save_moments
from argrpo.evaluation.moments import moments_of
from argrpo.rewards.loo_fid import LooFidReward
from argrpo.rewards.protocols import DistributionReward, Measuring, Restorable

_CPU = torch.device("cpu")
_PROMPT = Prompt("a digit", class_id=0)


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    judge = DigitJudge(width=4, feature_dim=12)
    # An untrained network hardly tells pictures apart; features of order 1 make distances of it.
    with torch.no_grad():
        for layer in judge.trunk[::2][:3]:
            layer.weight.mul_(5.0)
    save_judge(judge, folder)
    return folder


def _reward(judge: Path, **options: object) -> LooFidReward:
    reference = options.pop("reference", "dataset:digits/policy")
    return LooFidReward(str(reference), str(judge), features="digits_judge", device=_CPU, **options)


def _score(reward: LooFidReward, images: Tensor) -> Tensor:
    return reward.score(images, [_PROMPT] * len(images))


def _features(judge: Path, images: Tensor) -> Tensor:
    return load_judge(judge).features(images)


def test_it_is_a_distribution_reward_that_measures_and_goes_on(judge: Path) -> None:
    reward = _reward(judge)
    assert isinstance(reward, DistributionReward)
    assert isinstance(reward, Measuring)
    assert isinstance(reward, Restorable)


def test_a_batch_alone_is_scored_by_the_usual_frechet_distance(judge: Path) -> None:
    images, references = load_split("evaluation").images[:40], load_split("policy").images
    reward = _reward(judge, form="full", decay=0.0)
    scores = _score(reward, images)
    features, wanted = _features(judge, images), _features(judge, references)
    whole = frechet_distance(features, wanted)
    others = [torch.cat([features[:row], features[row + 1 :]]) for row in range(40)]
    distances = [frechet_distance(rows, wanted) - whole for rows in others]
    # differences of distances by two fp64 algorithms, rounded to fp32
    torch.testing.assert_close(scores, torch.tensor(distances), rtol=1e-5, atol=1e-7)
    assert reward.metrics()["distance"] == pytest.approx(whole, rel=1e-6)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_images_like_the_reference_are_worth_more_than_noise(judge: Path, form: str) -> None:
    images = torch.cat([load_split("evaluation").images[:30], torch.rand(10, 3, 32, 32)])
    scores = _score(_reward(judge, form=form), images)
    assert scores[:30].mean() > 0 > scores[30:].mean()


@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_the_state_moves_at_update_and_only_then(judge: Path, form: str) -> None:
    first, second = load_split("evaluation").images[:48].split(24)
    reward = _reward(judge, form=form)
    scores = _score(reward, first)
    # the same matrices through the same routines
    assert torch.equal(_score(reward, first), scores)
    reward.update()
    carried = _score(reward, second)
    assert not torch.equal(carried, _score(_reward(judge, form=form), second))
    before = reward.state_dict()
    reward.update()
    after = reward.state_dict()
    reward.update()  # nothing scored since
    assert torch.equal(reward.state_dict()["first"], after["first"])
    assert not torch.equal(before["first"], after["first"])
    torch.testing.assert_close(
        after["first"],
        0.25 * _features(judge, first).double().mean(dim=0)
        + 0.5 * _features(judge, second).double().mean(dim=0),
    )


@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_a_state_taken_up_again_scores_as_if_never_put_down(judge: Path, form: str) -> None:
    first, second = load_split("evaluation").images[:48].split(24)
    reward, other = _reward(judge, form=form), _reward(judge, form=form)
    _score(reward, first)
    reward.update()
    other.load_state_dict(reward.state_dict())
    assert torch.equal(_score(other, second), _score(reward, second))


def test_a_state_of_the_other_form_is_refused(judge: Path) -> None:
    with pytest.raises(ValueError, match=r"loo_fid\.second: expected a state of shape \[12, 12\]"):
        _reward(judge, form="full").load_state_dict(_reward(judge).state_dict())


def test_carried_moments_in_full_form_count_by_their_weight(judge: Path, tmp_path: Path) -> None:
    # A first batch that begins at nothing is alone; after that it has the weight that it earned.
    first, second = load_split("evaluation").images[:60].split(30)
    reward = _reward(judge, form="full", decay=0.5)
    _score(reward, first)
    reward.update()
    scores = _score(reward, second)
    save_moments(_biased(_features(judge, first)), tmp_path / "first.npz")
    # 0.5 * 0.5 of the first batch to 0.5 of the second
    begun = _reward(judge, form="full", decay=1 / 3, initial=str(tmp_path / "first.npz"))
    torch.testing.assert_close(_score(begun, second), scores, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["debias_on-init_given", "debias_off-init_given"])
def test_released_runs_of_the_diagonal_form_are_reproduced(
    judge: Path, golden: Path, tmp_path: Path, name: str, monkeypatch
) -> None:
    case = load_file(golden / "loofid_recipe" / "ema_loo.safetensors")
    record = json.loads((golden / "loofid_recipe" / "case.json").read_text())
    for part in ("reference", "initial"):
        moments = {"mu": case[f"{part}_mean"], "sigma_diagonal": case[f"{part}_variance"]}
        np.savez(tmp_path / f"{part}.npz", **{k: v.numpy() for k, v in moments.items()})
    monkeypatch.setattr("argrpo.rewards.loo_fid.load_extractor", GivenFeatures)
    reward = LooFidReward(
        str(tmp_path / "reference.npz"),
        "unused",
        initial=str(tmp_path / "initial.npz"),
        debias="debias_on" in name,
        parity_bootstrap=True,
        device=_CPU,
    )
    run = f"ema_loo-beta0.5-{name}"
    rewards, distances = [], []
    for features in case["features"].split(case["batch_sizes"].tolist()):
        rewards.append(_score(reward, features))
        distances.append(reward.metrics()["distance"])
        reward.update()
    tolerance = record["tolerance"]["rewards"]
    torch.testing.assert_close(torch.cat(rewards), case[f"{run}.rewards"], **tolerance)
    np.testing.assert_allclose(distances, case[f"{run}.ema_distance"].numpy(), rtol=1e-10)
    assert torch.allclose(reward.state_dict()["first"], case[f"{run}.m1"][-1], rtol=1e-10)


@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_an_image_without_features_is_not_scored_and_not_counted(judge: Path, form: str) -> None:
    images = load_split("evaluation").images[:20].clone()
    whole, spoiled = _reward(judge, form=form), _reward(judge, form=form)
    wanted = _score(whole, images[1:])
    images[0] = torch.inf
    scores = _score(spoiled, images)
    assert scores[0].isnan()
    assert torch.equal(scores[1:], wanted)
    whole.update()
    spoiled.update()
    assert torch.equal(whole.state_dict()["second"], spoiled.state_dict()["second"])


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_scores_on_a_gpu_are_those_on_a_cpu(judge: Path, form: str) -> None:
    here, there = _reward(judge, form=form), _reward(judge, torch.device("cuda"), form=form)
    for images in load_split("evaluation").images[:40].split(20):
        scores = _score(there, images.cuda())
        assert scores.device == _CPU
        # fp32 features through other convolutions (TF32 where it is on), fp64 after that
        torch.testing.assert_close(scores, _score(here, images), rtol=1e-2, atol=1e-3)
        here.update()
        there.update()


def test_a_step_of_one_image_scores_none_and_moves_nothing(judge: Path) -> None:
    reward = _reward(judge)
    scores = _score(reward, torch.rand(1, 3, 32, 32))
    assert scores.isnan().all()
    reward.update()
    assert reward.state_dict()["weight"] == 0
    assert np.isnan(reward.metrics()["distance"])


def test_two_ranks_score_as_one_process_with_all_images(judge: Path, tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(rank), str(tmp_path), str(judge)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
    images = load_split("evaluation").images
    for form in ("diagonal", "full"):
        alone = _reward(judge, form=form)
        for step in range(2):
            wanted = _score(alone, images[10 * step : 10 * step + 10])
            alone.update()
            parts = [torch.load(tmp_path / f"{form}-{rank}-{step}.pt") for rank in range(2)]
            assert [len(part) for part in parts] == [7, 3]
            # fp32 features of 7 and 3 images round otherwise than those of 10
            torch.testing.assert_close(torch.cat(parts), wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "ful"}, r"rewards\.loo_fid\.options\.form: expected diagonal or full, got 'ful'"),
        ({"decay": 1.0}, r"options\.decay: expected a number in \[0, 1\), got 1\.0"),
        ({"decay": float("nan")}, r"options\.decay: expected a number in \[0, 1\), got nan"),
        ({"form": "full", "debias": False}, r"options\.debias: expected true with form full"),
        ({"form": "full", "parity_bootstrap": True}, r"options\.parity_bootstrap: expected false"),
        ({"parity_bootstrap": True}, r"options\.initial: expected moments to begin with"),
        ({"reference": "no/such"}, r"options\.reference: expected an npz file or a folder"),
        ({"initial": "no/such"}, r"options\.initial: expected an npz file or a folder"),
    ],
)
def test_options_that_cannot_be_are_named(judge: Path, options: dict, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _reward(judge, **options)


def test_a_network_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"loo_fid\.options\.features_path: judge: expect"):
        _reward(tmp_path)


def test_moments_of_another_dimension_or_without_covariances_are_refused(
    judge: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "wide.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(ValueError, match=r"options\.reference: expected moments of 12 features"):
        _reward(judge, reference=tmp_path / "wide.npz")
    np.savez(tmp_path / "flat.npz", mean=np.zeros(12), std=np.ones(12))
    _reward(judge, reference=tmp_path / "flat.npz")
    with pytest.raises(ValueError, match=r"options\.reference: cov: expected a full covariance"):
        _reward(judge, reference=tmp_path / "flat.npz", form="full")
    with pytest.raises(ValueError, match=r"options\.initial: cov: expected a full covariance"):
        _reward(judge, initial=str(tmp_path / "flat.npz"), form="full")


class GivenFeatures:
    """An extractor whose images are their features."""

    name, dim = "given-1", 64

    def __init__(self, *_: object, **__: object) -> None: ...

    def __call__(self, images: Tensor) -> Tensor:
        return images


def _biased(features: Tensor):
    """Moments whose covariance is that of the images themselves, not an estimate."""
    from dataclasses import replace

    moments = moments_of(features)
    assert moments.cov is not None
    return replace(moments, cov=moments.cov * (len(features) - 1) / len(features))


_RANK = """
import sys
import torch
import torch.distributed as dist
from argrpo.data import Prompt
from argrpo.digits.dataset import load_split
from argrpo.rewards.loo_fid import LooFidReward

rank, folder, judge = int(sys.argv[1]), *sys.argv[2:]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
images = load_split("evaluation").images
cpu = torch.device("cpu")
for form in ("diagonal", "full"):
    reference = "dataset:digits/policy"
    reward = LooFidReward(reference, judge, features="digits_judge", form=form, device=cpu)
    for step in range(2):
        own = images[10 * step : 10 * step + 10][slice(0, 7) if rank == 0 else slice(7, 10)]
        scores = reward.score(own, [Prompt("a")] * len(own))
        torch.save(scores, f"{folder}/{form}-{rank}-{step}.pt")
        reward.update()
dist.destroy_process_group()
"""
