"""The network of published FID, with random weights, against torch-fidelity's."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import (
    interpolate_bilinear_2d_like_tensorflow1x as tensorflow_resize,
)

from argrpo.evaluation.features import load_extractor
from argrpo.evaluation.fid_inception import SPATIAL_DIM, FidInception, resize_like_tensorflow

_CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.manual_seed(0)
    torch.save(FidInception().state_dict(), path)
    return path


@pytest.mark.parametrize("size", [32, 256, 384])
def test_images_are_resized_as_tensorflow_did(size: int) -> None:
    images = torch.rand(2, 3, size, size)
    wanted = tensorflow_resize(images, size=(299, 299), align_corners=False)
    # the same four pixels and weights, added up in another order
    torch.testing.assert_close(resize_like_tensorflow(images, 299), wanted, rtol=0, atol=5e-7)


def test_features_and_logits_are_torch_fidelitys(weights: Path) -> None:
    levels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    theirs = FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    with torch.no_grad():
        features, logits = theirs(levels)
    views = load_extractor("inception_fid", weights, device=_CPU).views(levels / 255.0)
    # 255 * (level / 255) is off by one rounding, through 94 layers
    _close(views.features, features)
    _close(views.logits, logits)


def test_spatial_features_are_those_of_the_fourth_middle_block_channels_last(weights: Path) -> None:
    extractor = load_extractor("inception_fid", weights, device=_CPU)
    network = FidInception().eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    seen: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda _m, _i, out: seen.append(out))
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        network(images)
    spatial = extractor.views(images).spatial
    assert spatial.shape == (1, SPATIAL_DIM) == (1, 2023)
    _close(spatial[0].view(17, 17, 7)[3, 11], seen[0][0, :7, 3, 11])


def test_torchvisions_weights_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected a state_dict of pytorch-fid's or torch-fidel"):
        load_extractor("inception_fid", tmp_path / "other.pth", device=_CPU)
    with pytest.raises(FileNotFoundError, match="2015-12-05-6726825d"):
        load_extractor("inception_fid", tmp_path / "none.pth", device=_CPU)


def _close(ours: Tensor, theirs: Tensor) -> None:
    # of the largest, because random weights shrink the values towards 0 from layer to layer
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
