"""Networks that turn images into features, with random weights: their preprocessing and files."""

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import Inception3
from transformers import Dinov2Config, Dinov2Model, ViTConfig

from argrpo.digits.judges import DigitJudge, save_judge
from argrpo.evaluation.features import InceptionFeatures, load_extractor

_CPU = torch.device("cpu")
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture(scope="module")
def inception() -> Inception3:
    torch.manual_seed(0)
    return Inception3(transform_input=False, init_weights=False).eval()


@pytest.fixture(scope="module")
def inception_path(inception: Inception3, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "inception_v3.pth"
    torch.save(inception.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=70, patch_size=14)).save_pretrained(folder)
    return folder


def test_inception_features_are_its_average_pool_on_images_as_the_released_reward_sees_them(
    inception: Inception3, inception_path: Path
) -> None:
    extractor = load_extractor("inception", inception_path, device=_CPU, batch=2)
    images = torch.rand(3, 3, 64, 64)
    pooled: list[Tensor] = []
    hook = inception.avgpool.register_forward_hook(lambda _m, _i, out: pooled.append(out))
    resized = F.interpolate(
        images, size=(299, 299), mode="bilinear", align_corners=False, antialias=True
    )
    with torch.no_grad():
        inception((resized - _MEAN) / _STD)
    hook.remove()
    features = extractor(images)
    assert (features.shape, features.dtype, extractor.dim) == ((3, 2048), torch.float32, 2048)
    # batches of 2 and 1 against one of 3: convolutions round differently
    torch.testing.assert_close(features, pooled[0].flatten(1), rtol=1e-4, atol=1e-5)


def test_dinov2_features_are_the_class_token_after_the_norm(dinov2_folder: Path) -> None:
    extractor = load_extractor("dinov2", dinov2_folder, device=_CPU, batch=2)
    images = torch.rand(3, 3, 32, 32)
    resized = F.interpolate(
        images, size=(224, 224), mode="bicubic", align_corners=False, antialias=True
    )
    network = Dinov2Model.from_pretrained(dinov2_folder).eval()
    with torch.no_grad():
        tokens = network(pixel_values=(resized - _MEAN) / _STD).last_hidden_state
    features = extractor(images)
    assert extractor.dim == 24
    # batches of 2 and 1 against one of 3
    torch.testing.assert_close(features, tokens[:, 0], rtol=1e-4, atol=1e-5)


def test_a_judge_gives_what_stands_below_its_logits(tmp_path: Path) -> None:
    judge = DigitJudge(width=4, feature_dim=9)
    save_judge(judge, tmp_path)
    extractor = load_extractor("digits_judge", tmp_path, device=_CPU)
    images = torch.rand(5, 3, 32, 32)
    assert extractor.dim == 9
    assert torch.equal(extractor(images), judge.features(images))


def test_a_name_tells_weights_apart_and_not_files(inception_path: Path, tmp_path: Path) -> None:
    first = load_extractor("inception", inception_path, device=_CPU).name
    copy = tmp_path / "copy.pth"
    copy.write_bytes(inception_path.read_bytes())
    assert load_extractor("inception", copy, device=_CPU).name == first
    other = Inception3(init_weights=False)
    assert InceptionFeatures(other, device=_CPU).name != first
    assert first.startswith("inception-") and len(first) == len("inception-") + 12


def test_equal_weights_have_equal_names_in_every_process() -> None:
    # The hash is written into files: a change of how it is taken makes them all useless.
    network = nn.Module()
    network.fc = nn.Linear(2, 1)
    with torch.no_grad():
        network.fc.weight.copy_(torch.tensor([[1.0, 2.0]]))
        network.fc.bias.fill_(0.5)
    digest = hashlib.blake2b(digest_size=6)
    digest.update(b"fc.bias (1,) torch.float32" + b"\x00\x00\x00\x3f")
    digest.update(b"fc.weight (1, 2) torch.float32" + b"\x00\x00\x80\x3f\x00\x00\x00\x40")
    assert InceptionFeatures(network, device=_CPU).name == f"inception-{digest.hexdigest()}"


def test_files_of_something_else_are_refused(tmp_path: Path, dinov2_folder: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("weights")
    for name in ("other.pth", "text.pth"):
        with pytest.raises(ValueError, match="features_path: expected a state_dict of torchvision"):
            load_extractor("inception", tmp_path / name, device=_CPU)
    with pytest.raises(FileNotFoundError, match="features_path: expected a state_dict of torchv"):
        load_extractor("inception", tmp_path / "missing.pth", device=_CPU)
    with pytest.raises(FileNotFoundError, match="features_path: expected a folder with a DINOv2"):
        load_extractor("dinov2", tmp_path, device=_CPU)
    ViTConfig(hidden_size=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a DINOv2 of transformers, got vit in"):
        load_extractor("dinov2", tmp_path, device=_CPU)
    with pytest.raises(ValueError, match="features: expected one of inception, inception_fid, d"):
        load_extractor("resnet", tmp_path, device=_CPU)


def test_a_dinov2_without_some_of_its_weights_is_refused(
    dinov2_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(dinov2_folder / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((dinov2_folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"expected a DINOv2 .* without layernorm\.weight"):
        load_extractor("dinov2", tmp_path, device=_CPU)
