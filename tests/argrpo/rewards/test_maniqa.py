"""MANIQA's crops and averages against pyiqa's and AR-GRPO's, on its own network made narrow."""

import numpy as np
import pytest
import torch

from argrpo.data import Prompt
from argrpo.rewards import maniqa
from argrpo.rewards.maniqa import CropRule, ManiqaReward, crop_corners, patch_scores
from argrpo.rewards.pyiqa_networks import build_metric
from argrpo.rewards.sharing import SharedNetworks

_CPU = torch.device("cpu")
_NARROW = {"embed_dim": 16, "dim_mlp": 16, "num_heads": [2, 2]}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """pyiqa's metric, of 16 features instead of 768, and a file of its random weights."""
    import timm
    from pyiqa.default_model_configs import DEFAULT_CONFIGS
    from pyiqa.models.inference_model import InferenceModel

    create = timm.create_model

    def create_narrow(name: str, pretrained: bool) -> torch.nn.Module:
        return create(name, pretrained=False, embed_dim=16, depth=12, num_heads=2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", create_narrow)
        patch.setitem(DEFAULT_CONFIGS["maniqa"], "metric_opts", {"type": "MANIQA", **_NARROW})
        torch.manual_seed(0)
        metric = InferenceModel("maniqa", device=_CPU, check_input_range=False, pretrained=False)
        with torch.no_grad():  # away from where a random network's last ReLU gives 0
            metric.net.fc_score[3].bias.fill_(0.5)
        path = tmp_path_factory.mktemp("maniqa") / "narrow.pt"
        torch.save(metric.net.state_dict(), path)
        yield metric, str(path)


def _prompts(count: int) -> list[Prompt]:
    return [Prompt("a")] * count


@pytest.mark.parametrize("size", [(256, 256), (240, 300), (224, 224), (200, 230)])
def test_the_grid_gives_the_number_of_pyiqa(size: tuple[int, int], narrow) -> None:
    metric, path = narrow
    metric.net.test_sample = 3  # not a square: the grid's last crop is left out
    images = torch.rand(2, 3, *size)
    judge = ManiqaReward(path, num_crops=3, crop_batch=4, device=_CPU)
    # fp32 sums over 2,352 patches in another order
    torch.testing.assert_close(
        judge(images, _prompts(2)), metric(images).flatten(), atol=1e-5, rtol=0
    )


def test_crops_of_the_grid_are_those_of_pyiqa() -> None:
    from pyiqa.archs.arch_util import uniform_crop

    image = torch.rand(1, 3, 256, 384)
    for count in (1, 2, 5, 9, 20):
        rule = CropRule(num_crops=count)
        ours = [image[0, :, t : t + 224, s : s + 224] for t, s in crop_corners(image, rule)[0]]
        assert torch.equal(torch.stack(ours), uniform_crop(image, 224, count))


def test_random_crops_are_averaged_each_for_itself(narrow) -> None:
    metric, path = narrow
    metric.net.test_sample = 1
    images = torch.rand(2, 3, 256, 240)
    judge = ManiqaReward(path, crops="random", num_crops=2, seed=1, device=_CPU)
    scores = judge(images, _prompts(2))
    network = build_metric("maniqa", path, _NARROW).network
    for image, corners, score in zip(
        images, crop_corners(images, CropRule("random", 2, 1)), scores, strict=True
    ):
        crops = torch.stack([image[:, t : t + 224, s : s + 224] for t, s in corners])
        with torch.no_grad():
            each, weights = patch_scores(network, crops * 2 - 1)
        wanted = ((each * weights).sum(1) / weights.sum(1)).mean()
        torch.testing.assert_close(score, wanted, atol=1e-5, rtol=0)


def test_random_crops_depend_on_the_image_and_the_seed_alone() -> None:
    images = torch.rand(3, 3, 256, 300)
    rule = CropRule("random", 20, 5)
    corners = crop_corners(images, rule)
    assert crop_corners(images[1:2], rule) == corners[1:2]
    assert corners[0] != corners[1]
    assert crop_corners(images, CropRule("random", 20, 6)) != corners
    tops, lefts = np.array(corners).reshape(-1, 2).T
    # numpy's randint, which AR-GRPO draws with, leaves its upper end out.
    assert tops.min() >= 0 and tops.max() < 32 and lefts.max() < 76
    assert len(set(zip(tops, lefts, strict=True))) > 50


def test_a_score_does_not_depend_on_how_crops_are_batched(narrow) -> None:
    _, path = narrow
    images = torch.rand(2, 3, 256, 256)
    scores = [
        ManiqaReward(path, num_crops=2, device=_CPU, **batches)(images, _prompts(2))
        for batches in ({}, {"crop_batch": 1}, {"crop_batch": 3, "reward_batch": 1})
    ]
    # fp32 products over other numbers of rows
    torch.testing.assert_close(scores[1], scores[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores[2], scores[0], atol=1e-5, rtol=0)


def test_bfloat16_is_near(narrow) -> None:
    _, path = narrow
    images = torch.rand(1, 3, 256, 256)
    wide = ManiqaReward(path, num_crops=2, device=_CPU)(images, _prompts(1))
    half = ManiqaReward(path, num_crops=2, dtype="bfloat16", device=_CPU)(images, _prompts(1))
    # The score is an average of sums near 0.5, each good to 2^-8 of it.
    torch.testing.assert_close(half, wide, atol=1e-2, rtol=0)


def test_judges_of_one_file_judge_an_image_once(narrow, monkeypatch) -> None:
    _, path = narrow
    shared = SharedNetworks()
    options = {"num_crops": 1, "device": _CPU, "shared": shared}
    first, second = (ManiqaReward(path, name=name, **options) for name in ("maniqa", "again"))
    calls: list[int] = []
    monkeypatch.setattr(
        maniqa, "patch_scores", lambda n, c: (calls.append(len(c)), patch_scores(n, c))[1]
    )
    images = torch.rand(2, 3, 256, 256)
    assert torch.equal(first(images, _prompts(2)), second(images, _prompts(2)))
    assert calls == [2]


def test_random_crops_of_small_images_are_refused(narrow) -> None:
    _, path = narrow
    judge = ManiqaReward(path, crops="random", device=_CPU)
    with pytest.raises(ValueError, match="more than 224 pixels a side for random crops, got 224"):
        judge(torch.rand(1, 3, 224, 256), _prompts(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "niqe"}, "metric: expected one of maniqa, maniqa-pipal"),
        ({"crops": "all"}, "crops: expected grid or random, got 'all'"),
        ({"num_crops": 0}, "num_crops: expected at least 1, got 0"),
        ({"dtype": "int8"}, "dtype: expected one of float32, bfloat16"),
    ],
)
def test_an_option_that_is_none_is_refused(options: dict, message: str, narrow) -> None:
    with pytest.raises(ValueError, match=rf"rewards\.maniqa\.options\.{message}"):
        ManiqaReward(narrow[1], device=_CPU, **options)


def test_a_missing_file_is_named_with_where_it_is_published(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ckpt_koniq10k\.pt \(published in IIGROUP/MANIQA"):
        ManiqaReward(str(tmp_path / "none"), device=_CPU)
