"""Distances to the prompt's reference image, against their formulas."""

import pytest
import torch
from torch.nn import functional as F

from argrpo.data import Prompt
from argrpo.rewards.background_loop import BackgroundLoop
from argrpo.rewards.image_distance import LpipsReward, MseReward
from argrpo.rewards.pool import Asking, Scoring
from argrpo.rewards.quantize import StepMap, quantized

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


def test_a_reference_of_another_size_is_refused() -> None:
    images, prompts, _ = _pairs(1, 8)
    with pytest.raises(ValueError, match=r"rewards\.mse: expected references of shape \[3, 4, 4\]"):
        MseReward()(images[..., :4, :4], prompts)


def test_files_that_are_no_backbone_are_refused(backbone, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected vgg16-397923af\.pth .*torchvision"):
        LpipsReward(str(tmp_path / "none"), device=_CPU)
    with pytest.raises(ValueError, match="net: expected one of vgg, alex, squeeze, got 'vit'"):
        LpipsReward(backbone[0], net="vit", device=_CPU)
    with pytest.raises(ValueError, match=r"lpips\.options\.backbone: .*without features\."):
        LpipsReward(backbone[0], net="vgg", device=_CPU)
