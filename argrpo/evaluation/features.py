"""Networks that turn images into features, by which sets of images are compared.

Each does its own preprocessing, so that references and generated images go through the very same
one, and its name carries a hash of its weights, so that moments made by one network are never
compared with features of another.

    inception      torchvision's Inception-v3, 2048 features after its average pool; images resized
                   to 299 (bilinear, antialiased), ImageNet's mean and deviation. Not the network
                   of published FID figures (TensorFlow's), and not comparable with it.
    inception_fid  the network of published FID figures, see fid_inception.py.
    dinov2         a DINOv2 of transformers: the class token after the last norm; resized to 224
                   (bicubic, antialiased), ImageNet's mean and deviation.
    digits_judge   a judge of the embedded digits: what stands below its logits.

Shapes: N images, C features, K classes of the network.

Source: Baran et al., arXiv:2603.23086, for the first; Stein et al., arXiv:2306.04675, the second.
"""

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torchvision.transforms import functional as VF

from argrpo.digits.judges import load_judge
from argrpo.evaluation.fid_inception import FidInception
from argrpo.model_paths import blamed_on

FeatureKind = Literal["inception", "inception_fid", "dinov2", "digits_judge"]

_IMAGENET_MEAN, _IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_INCEPTION_SIZE, _DINOV2_SIZE = 299, 224


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class Views:
    """All that a network says of images."""

    features: Tensor  # [N, C] fp32
    logits: Tensor | None = None  # [N, K] fp32, where it is a classifier
    spatial: Tensor | None = None  # [N, 2023] fp32 of sFID, where it has them


class FeatureExtractor(Protocol):
    """A frozen network with its preprocessing."""

    name: str
    """Kind and hash of the weights: equal names give equal features."""

    dim: int
    """C."""

    def __call__(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] floating point in [0, 1], any device -> [N, C] fp32 on the network's."""
        ...

    def views(self, images: Tensor) -> Views:
        """The same features, and what else the network says of the images."""
        ...


def load_extractor(
    kind: str, path: str | Path, *, device: torch.device, batch: int = 64
) -> FeatureExtractor:
    """A network from local files.

    Args:
        kind: one of `FeatureKind`.
        path: inception: a state_dict of torchvision's inception_v3; inception_fid: one of
            pytorch-fid or torch-fidelity; dinov2: a folder of transformers with config.json;
            digits_judge: the folder of a judge.
        device: where it runs.
        batch: images in the network at a time; bounds memory.

    Raises:
        ValueError: there is no such kind, or the files are of another network.
        FileNotFoundError: nothing is there.
    """
    if kind == "inception":
        return InceptionFeatures(_load_inception(Path(path)), device=device, batch=batch)
    if kind == "inception_fid":
        return FidInceptionFeatures(_load_fid_inception(Path(path)), device=device, batch=batch)
    if kind == "dinov2":
        return Dinov2Features(_load_dinov2(Path(path)), device=device, batch=batch)
    if kind == "digits_judge":
        with blamed_on("features_path"):
            return JudgeFeatures(path, device=device)
    raise ValueError(f"features: expected one of {', '.join(get_args(FeatureKind))}, got {kind!r}")


class InceptionFeatures:
    """Average-pooled features of torchvision's Inception-v3.

    Args:
        network: an Inception3; its last layer is taken off.
        device: where it runs.
        batch: images in the network at a time.
    """

    def __init__(self, network: nn.Module, *, device: torch.device, batch: int = 64) -> None:
        self.name = f"inception-{weights_hash(network)}"
        self.dim = int(network.fc.in_features)  # type: ignore[union-attr, arg-type]
        head = network.fc
        assert isinstance(head, nn.Linear)
        self._head = _frozen(head, device)
        network.fc = nn.Identity()
        self._network = _frozen(network, device)
        self._device = device
        self._batch = batch

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([self._network(self._pixels(p)) for p in images.split(self._batch)])

    @torch.no_grad()
    def views(self, images: Tensor) -> Views:
        features = self(images)
        return Views(features, self._head(features))

    def _pixels(self, images: Tensor) -> Tensor:
        bilinear = VF.InterpolationMode.BILINEAR
        return _imagenet_pixels(images.to(self._device), _INCEPTION_SIZE, bilinear)


class FidInceptionFeatures:
    """What TensorFlow's Inception of 2015 says: features, logits and those of sFID.

    Args:
        network: with its weights.
        device: where it runs.
        batch: images in the network at a time.
    """

    dim = 2048

    def __init__(self, network: FidInception, *, device: torch.device, batch: int = 64) -> None:
        self.name = f"inception_fid-{weights_hash(network)}"
        self._network = _frozen(network, device)
        self._device = device
        self._batch = batch

    def __call__(self, images: Tensor) -> Tensor:
        return self.views(images).features

    @torch.no_grad()
    def views(self, images: Tensor) -> Views:
        parts = [self._network(p.to(self._device).float()) for p in images.split(self._batch)]
        pooled, logits, spatial = (torch.cat(outputs) for outputs in zip(*parts, strict=True))
        return Views(pooled, logits, spatial)


class Dinov2Features:
    """The class token of a DINOv2, after the last norm.

    Args:
        network: a model of transformers with `config.hidden_size` and `pooler_output`.
        device: where it runs.
        batch: images in the network at a time.
    """

    def __init__(self, network: nn.Module, *, device: torch.device, batch: int = 64) -> None:
        self.name = f"dinov2-{weights_hash(network)}"
        self.dim = int(network.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self._network = _frozen(network, device)
        self._device = device
        self._batch = batch

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([self._features(part) for part in images.split(self._batch)])

    def views(self, images: Tensor) -> Views:
        return Views(self(images))

    def _features(self, images: Tensor) -> Tensor:
        bicubic = VF.InterpolationMode.BICUBIC
        pixels = _imagenet_pixels(images.to(self._device), _DINOV2_SIZE, bicubic)
        pooled: Tensor = self._network(pixel_values=pixels).pooler_output
        return pooled.float()


class JudgeFeatures:
    """What a judge of the embedded digits sees below its logits.

    Args:
        path: folder of the judge.
        device: where it runs.
    """

    def __init__(self, path: str | Path, *, device: torch.device) -> None:
        self._judge = load_judge(path, device=device)
        self.name = f"digits_judge-{weights_hash(self._judge)}"
        self.dim = self._judge.feature_dim
        self._device = device

    def __call__(self, images: Tensor) -> Tensor:
        return self._judge.features(images.to(self._device))

    @torch.no_grad()
    def views(self, images: Tensor) -> Views:
        features = self(images)
        return Views(features, self._judge.head(features))


class _Weighted(Protocol):
    def state_dict(self) -> dict[str, Any]: ...


def weights_hash(network: _Weighted) -> str:
    """12 hex digits of all weights, their names and sizes."""
    digest = hashlib.blake2b(digest_size=6)
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _imagenet_pixels(images: Tensor, size: int, mode: VF.InterpolationMode) -> Tensor:
    resized = VF.resize(images.float(), [size, size], interpolation=mode, antialias=True)
    return VF.normalize(resized, _IMAGENET_MEAN, _IMAGENET_STD)


def _frozen(network: nn.Module, device: torch.device) -> nn.Module:
    return network.eval().requires_grad_(False).to(device, torch.float32)


def _load_inception(path: Path) -> nn.Module:
    from torchvision.models import Inception3

    wanted = "a state_dict of torchvision's inception_v3"
    published = f"{wanted} (published as Inception_V3_Weights.IMAGENET1K_V1)"
    network = Inception3(transform_input=False, init_weights=False)
    _load_weights(network, path, wanted, published)
    return network


def _load_fid_inception(path: Path) -> FidInception:
    wanted = "a state_dict of pytorch-fid's or torch-fidelity's Inception"
    network = FidInception()
    _load_weights(network, path, wanted, f"{wanted} (...-inception-2015-12-05-6726825d.pth)")
    return network


def _load_weights(network: nn.Module, path: Path, wanted: str, published: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"features_path: expected {published}, got {path}")
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        # torch's own words advise to let the file run code.
        raise ValueError(
            f"features_path: expected {wanted}, got {path}, which is damaged or holds more than "
            "tensors"
        ) from error
    # Another network's keys or sizes, or a damaged file.
    except (RuntimeError, AttributeError, TypeError, ValueError, EOFError, KeyError) as error:
        raise _not(path, wanted, error) from error


def _load_dinov2(path: Path) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"features_path: expected a folder with a DINOv2 of transformers, got {path}"
        )
    wanted = "a DINOv2 of transformers"
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, OSError) as error:
        raise _not(path, wanted, error) from error
    if not str(config.model_type).startswith("dinov2"):
        raise ValueError(f"features_path: expected {wanted}, got {config.model_type} in {path}")
    try:
        network, loaded = AutoModel.from_pretrained(
            path, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise _not(path, wanted, error) from error
    # transformers fills what a file lacks with random numbers.
    if loaded["missing_keys"]:
        missing = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise ValueError(f"features_path: expected {wanted}, got {path} without {missing}")
    return network


def _not(path: Path, wanted: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"features_path: expected {wanted}, got {path}: {reason[:200]}")
