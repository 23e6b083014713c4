"""Distances to the prompt's reference image, against their formulas."""

import pytest
import torch
from torch.nn import functional as F

from argrpo.config import TrainConfig
from argrpo.data import Prompt
from argrpo.image_files import save_image
from argrpo.model_config import PolicyConfig, TokenizerConfig
from argrpo.reward_config import RewardConfig
from argrpo.rewards.background_loop import BackgroundLoop
from argrpo.rewards.image_distance import LpipsReward, MseReward
from argrpo.rewards.pool import Asking, Scoring
from argrpo.rewards.quantize import StepMap, quantized
from argrpo.rewards.reference_images import references_of
from argrpo.rewards.scoring import Judges

_CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A file of AlexNet's layers under LPIPS, with random weights, and these layers."""
    from torchvision.models import alexnet

    torch.manual_seed(0)
    features = alexnet(weights=None).features.eval()
    path = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    weights = {f"features.{key}": value for key, value in features.state_dict().items()}
    torch.save({**weights, "classifier.1.weight": torch.zeros(1)}, path)
    return str(path), features


def _pairs(count: int, size: int) -> tuple[torch.Tensor, list[Prompt], torch.Tensor]:
    images, references = torch.rand(2, count, 3, size, size)
    return images, [Prompt("a", reference_image=r) for r in references], references


def test_mse_is_the_mean_squared_difference_of_pixels() -> None:
    images, prompts, references = _pairs(3, 8)
    scores = MseReward()(images, prompts)
    torch.testing.assert_close(scores, (images - references).square().mean(dim=(1, 2, 3)))
    same = [Prompt("a", reference_image=image) for image in images]
    assert MseReward()(images, same).tolist() == [0.0, 0.0, 0.0]


def test_a_reference_is_read_from_its_file_and_brought_to_the_size_of_images(tmp_path) -> None:
    # Wider than high: the middle is compared. A ramp stays one when it is resized.
    ramp = torch.linspace(0, 1, 16)[:, None].expand(3, 16, 32).clone()
    ramp[:, :, :8] = ramp[:, :, 24:] = 1.0
    save_image(ramp, tmp_path / "ramp.png", pixels="round")
    prompt = Prompt("a", reference_path=tmp_path / "ramp.png")
    images = ramp[None, :, :, 8:24].repeat(2, 1, 1, 1)
    assert MseReward()(images, [prompt, Prompt("b")])[0] < 4e-6, "half a level of 8 bits, squared"
    small = F.interpolate(images, scale_factor=0.5, mode="bicubic", antialias=True)
    (rows, found) = references_of(small, [prompt, Prompt("b")])
    assert rows.tolist() == [0] and found.shape == (1, 3, 8, 8)
    # Next to the cut columns the whole picture's resizing sees beyond the cut.
    torch.testing.assert_close(found[0, :, :, 2:6], small[0, :, :, 2:6], atol=1 / 255, rtol=0)


def test_a_groups_reference_is_read_once(tmp_path, monkeypatch) -> None:
    save_image(torch.zeros(3, 8, 8), tmp_path / "a.png")
    prompt, read = Prompt("a", reference_path=tmp_path / "a.png"), []
    monkeypatch.setattr(
        "argrpo.data.read_image", lambda *words: read.append(words) or torch.zeros(3, 8, 8)
    )
    assert MseReward()(torch.ones(4, 3, 8, 8), [prompt] * 4).tolist() == [1.0] * 4
    assert len(read) == 1


def test_a_run_whose_prompts_have_no_reference_is_refused(tmp_path) -> None:
    config = TrainConfig(
        output_dir=str(tmp_path),
        policy=PolicyConfig(path="unused"),
        tokenizer=TokenizerConfig(path="unused"),
        rewards=[RewardConfig(name="mse", weight=-1.0)],
    )
    judges = Judges(config, _CPU)
    with pytest.raises(ValueError, match=r"rewards\.mse: expected prompts with a reference image"):
        judges.check_prompts([Prompt("a"), Prompt("b")])
    judges.check_prompts([Prompt("a"), Prompt("b", reference_path=tmp_path / "b.png")])


def test_an_image_without_a_reference_is_not_scored(backbone) -> None:
    images, prompts, _ = _pairs(3, 64)
    prompts[1] = Prompt("a")
    for judge in (MseReward(), LpipsReward(backbone[0], net="alex", device=_CPU, reward_batch=1)):
        assert judge(images, prompts).isnan().tolist() == [False, True, False]
        assert judge(images, [Prompt("a")] * 3).isnan().all()


def test_only_an_image_beside_a_reference_can_fail(backbone) -> None:
    images, prompts, _ = _pairs(3, 64)
    prompts[1] = Prompt("a")
    images[2] = torch.nan
    prompts[2:] = [Prompt("a", reference_image=torch.rand(3, 64, 64))]
    loop = BackgroundLoop()
    for judge in (MseReward(), LpipsReward(backbone[0], net="alex", device=_CPU)):
        # As a run asks it, which ends where too many images fail.
        scoring = Scoring([judge], prompts, Asking(loop, 1.0))
        scoring.add(images)
        answer = scoring.finish()[0].answer
        assert answer.scores.isnan().tolist() == [False, True, True]
        assert answer.num_failures == 1
        stepped = quantized(judge, StepMap([0.5], [1.0, 0.0]), "steps")
        for asked in (judge, stepped):
            nowhere = Scoring([asked], [Prompt("a")] * 3, Asking(loop, 1.0))
            nowhere.add(images)
            answer = nowhere.finish()[0].answer
            assert answer.scores.isnan().all()
            assert (answer.num_failures, answer.problem) == (0, None)


def test_lpips_is_its_formula(backbone) -> None:
    import lpips

    path, features = backbone
    images, prompts, references = _pairs(3, 64)
    scores = LpipsReward(path, net="alex", device=_CPU, reward_batch=2)(images, prompts)
    channels = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).lins
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ([-0.03, -0.088, -0.188], [0.458, 0.448, 0.45])
    )
    x, y = (((pixels * 2 - 1) - mean) / std for pixels in (images, references))
    wanted = torch.zeros(3)
    with torch.no_grad():
        stage = 0
        for index, layer in enumerate(features):
            x, y = layer(x), layer(y)
            if index in (1, 4, 7, 9, 11):  # the five ReLUs
                gap = (F.normalize(x, dim=1, eps=1e-10) - F.normalize(y, dim=1, eps=1e-10)) ** 2
                weight = channels[stage].model[-1].weight.view(1, -1, 1, 1)
                wanted += (gap * weight).sum(1).mean((1, 2))
                stage += 1
    # fp32 sums over up to 384 channels and 225 places
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=1e-4)


def test_files_that_are_no_backbone_are_refused(backbone, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected vgg16-397923af\.pth .*torchvision"):
        LpipsReward(str(tmp_path / "none"), device=_CPU)
    with pytest.raises(ValueError, match="net: expected one of vgg, alex, squeeze, got 'vit'"):
        LpipsReward(backbone[0], net="vit", device=_CPU)
    with pytest.raises(ValueError, match=r"lpips\.options\.backbone: .*without features\."):
        LpipsReward(backbone[0], net="vgg", device=_CPU)
