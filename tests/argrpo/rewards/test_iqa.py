"""Metrics of pyiqa from local files: their own numbers, and no download, code or half a network."""

import pickle
import sys

import pytest
import torch

from argrpo.config import RewardConfig
from argrpo.data import Prompt
from argrpo.rewards.iqa import IqaReward
from argrpo.rewards.maniqa import ManiqaReward
from argrpo.rewards.registry import make_reward
from argrpo.rewards.sharing import SharedNetworks

_CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cnniqa(tmp_path_factory):
    """A small metric of pyiqa and a file of its random weights."""
    from pyiqa.models.inference_model import InferenceModel

    torch.manual_seed(0)
    metric = InferenceModel("cnniqa", device=_CPU, pretrained=None)
    path = tmp_path_factory.mktemp("iqa") / "cnniqa.pth"
    torch.save({"params": metric.net.state_dict()}, path)
    return metric, path


def _make(name: str, **options: object):
    return make_reward(RewardConfig(name=name, options=options), _CPU, None)


def test_a_metric_from_a_file_gives_the_number_of_pyiqa(cnniqa) -> None:
    metric, path = cnniqa
    judge = _make("iqa:cnniqa", weights=str(path), reward_batch=2)
    images = torch.rand(3, 3, 64, 64)
    assert judge.name == "cnniqa"
    # fp32 products over other numbers of rows
    wanted = torch.cat([metric(image[None]).flatten() for image in images])
    torch.testing.assert_close(judge(images, [Prompt("a")] * 3), wanted, atol=1e-5, rtol=1e-5)


def test_a_metric_of_no_weights_needs_no_file() -> None:
    import pyiqa

    images = torch.rand(2, 3, 32, 32)
    ours = _make("iqa:entropy")(images, [Prompt("a")] * 2)
    torch.testing.assert_close(ours, pyiqa.create_metric("entropy", device=_CPU)(images).flatten())


def test_a_metric_with_a_reference_compares_with_the_prompts_and_scores_no_other() -> None:
    images, reference = torch.rand(3, 3, 32, 32), torch.rand(3, 32, 32)
    prompts = [Prompt("a"), Prompt("a", reference_image=reference), Prompt("a")]
    judge = _make("iqa:psnr", settings={"test_y_channel": False})
    scores = judge(images, prompts)
    # The others are no failures; of a metric without a reference all images are to be scored.
    assert judge.applies(prompts) == [False, True, False]
    assert _make("iqa:entropy").applies(prompts) == [True] * 3
    assert scores.isnan().tolist() == [True, False, True]
    mse = (images[1] - reference).square().mean()
    torch.testing.assert_close(scores[1], -10 * mse.log10(), atol=1e-4, rtol=0)
    assert _make("iqa:psnr")(images, [Prompt("a")] * 3).isnan().all()


def test_judges_of_one_metric_score_an_image_once(cnniqa) -> None:
    _, path = cnniqa
    shared = SharedNetworks()
    options = {"device": _CPU, "shared": shared}
    first, second = (IqaReward("cnniqa", str(path), name=n, **options) for n in ("a", "b"))
    calls: list[int] = []
    first._loaded._network.register_forward_hook(lambda *_: calls.append(1))
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(first(images, [Prompt("a")] * 2), second(images, [Prompt("a")] * 2))
    assert calls == [1]


def test_what_would_be_downloaded_is_named_with_its_place_and_address() -> None:
    with pytest.raises(FileNotFoundError) as refused:
        _make("iqa:cnniqa")
    assert str(refused.value).startswith("rewards.iqa:cnniqa.options.weights: expected ")
    assert "pyiqa/CNNIQA_koniq10k" in str(refused.value)
    assert "published at https://" in str(refused.value)


@pytest.mark.parametrize("name", ["no_such_metric", "fid", "inception_score"])
def test_a_metric_that_scores_no_single_image_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"iqa:{name}\.options\.metric: expected one of pyiqa"):
        _make(f"iqa:{name}")


def test_a_package_that_is_not_there_is_named_with_the_extra(cnniqa, tmp_path, monkeypatch) -> None:
    for name in ("pyiqa.default_model_configs", "lpips"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it now raises ImportError
    with pytest.raises(ValueError, match=r"package pyiqa .*pip install 'argrpo\[iqa\]'"):
        _make("iqa:psnr")
    (tmp_path / "vgg.pth").touch()
    with pytest.raises(ValueError, match=r"package lpips.*pip install 'argrpo\[iqa\]'"):
        _make("lpips", backbone=str(tmp_path / "vgg.pth"))


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("this would have run",))


def test_files_of_something_else_are_refused(cnniqa, tmp_path, capsys) -> None:
    metric, _ = cnniqa
    weights = metric.net.state_dict()
    key = sorted(weights)[0]
    for name, content, message in (
        ("less.pt", {k: v for k, v in weights.items() if k != key}, f"which lacks {key}"),
        ("more.pt", {**weights, "x": torch.zeros(1)}, "which also holds x"),
        ("other.pt", {**weights, key: torch.zeros(1, 2, 3)}, f"another one for {key}"),
        ("text.pt", "hello", "which lacks"),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=rf"options\.weights: expected .*{message}"):
            _make("iqa:cnniqa", weights=str(tmp_path / name))
    (tmp_path / "code.pt").write_bytes(pickle.dumps(_Code()))
    with pytest.raises(ValueError, match="damaged or holds more than tensors"):
        _make("iqa:cnniqa", weights=str(tmp_path / "code.pt"))
    assert "this would have run" not in capsys.readouterr().out


def test_libraries_are_as_before_once_a_metric_is_built(cnniqa) -> None:
    import timm

    before = torch.load, torch.hub.download_url_to_file, timm.create_model
    _make("iqa:cnniqa", weights=str(cnniqa[1]))
    assert before == (torch.load, torch.hub.download_url_to_file, timm.create_model)


@pytest.mark.slow
def test_the_full_network_of_maniqa_is_built_offline_from_a_file(tmp_path) -> None:
    """136 million random weights through the recipe, and one crop through the network."""
    import timm
    from pyiqa.models.inference_model import InferenceModel

    create = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, pretrained: create(name))
        metric = InferenceModel("maniqa", device=_CPU, check_input_range=False, pretrained=False)
    weights = metric.net.state_dict()
    assert sum(value.numel() for value in weights.values()) > 135e6
    path = tmp_path / "ckpt_koniq10k.pt"
    halved = {k: v.bfloat16() if v.is_floating_point() else v for k, v in weights.items()}
    torch.save(halved, path)
    judge = ManiqaReward(str(path), num_crops=1, dtype="bfloat16", device=_CPU)
    read = judge._network._network
    assert torch.equal(read.vit.blocks[9].mlp.fc1.weight, halved["vit.blocks.9.mlp.fc1.weight"])
    assert judge(torch.rand(1, 3, 256, 256), [Prompt("a")]).isfinite().all()
