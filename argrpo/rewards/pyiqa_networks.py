"""Networks of pyiqa from local files, without a download and without running code from a file.

pyiqa fetches what a metric needs while it builds it, backbones of timm included even where the
metric's own file has all their weights, and unpickles files freely. Here nothing is fetched, a file
is read as weights and nothing else, and it has to hold every weight of the network. What is missing
is named with where it is looked for and where it is published.

pyiqa's licence is PolyForm Noncommercial since 0.1.16.

Source: chaofengc/IQA-PyTorch at 01ae427.
"""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from argrpo.models.checkpoint_files import first_keys


class Metric(NamedTuple):
    """A metric of pyiqa."""

    network: nn.Module
    needs_reference: bool


def metric_names() -> list[str]:
    """All metrics that score single images."""
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    return sorted(name for name in DEFAULT_CONFIGS if not _is_of_sets(name))


def build_metric(
    metric: str, weights: str | None, settings: Mapping[str, Any] | None = None
) -> Metric:
    """A metric with its weights, on the CPU.

    Args:
        metric: a name of pyiqa.
        weights: a file with all of its weights; None where it has none, or where they lie in the
            cache of torch.hub under the name that pyiqa gives them.
        settings: of the network, over pyiqa's own.

    Raises:
        ValueError: no such metric, it cannot be built so, or the file is not its.
        FileNotFoundError: a file is missing.
    """
    try:
        from pyiqa.default_model_configs import DEFAULT_CONFIGS
        from pyiqa.utils import get_root_logger
    except ImportError as error:
        raise ValueError(
            f"metric: expected the package pyiqa for {metric}, got none that can be imported "
            f"({error}); pip install 'argrpo[iqa]'"
        ) from error
    if metric not in DEFAULT_CONFIGS or _is_of_sets(metric):
        raise ValueError(
            f"metric: expected one of pyiqa for single images, got {metric!r}; they are "
            f"{', '.join(metric_names())}"
        )
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(
            f"weights: expected a file of {metric} (published in chaofengc/IQA-PyTorch-Weights), "
            f"got nothing at {weights}"
        )
    get_root_logger(log_level=logging.WARNING)  # the first call decides
    # What leaves a network untrained differs by metric; one that knows neither has no weights.
    empty: list[dict[str, Any]] = [{"pretrained": False}, {"pretrained": None}]
    model = _first_built(
        metric, [{**(settings or {}), **more} for more in (empty if weights else [{}])]
    )
    if weights is not None:
        _load(model.net, weights, metric)
    return Metric(model.net.eval(), model.metric_mode == "FR")


def _first_built(metric: str, choices: list[dict[str, Any]]) -> Any:
    """pyiqa's model of a metric, by the first settings that can be built."""
    from pyiqa.models.inference_model import InferenceModel

    failure: Exception | None = None
    for settings in choices:
        try:
            with _offline(keep_backbones="pretrained" not in settings):
                return InferenceModel(
                    metric, device=torch.device("cpu"), check_input_range=False, **settings
                )
        except Exception as error:  # of whatever its networks are built with
            failure = error
    if isinstance(failure, FileNotFoundError) and str(failure).startswith("weights: "):
        raise failure
    reason = " ".join(str(failure).split()) or type(failure).__name__
    raise ValueError(
        f"metric: expected one that can be built from local files, got {metric}: {reason[:300]}"
    ) from failure


def _is_of_sets(name: str) -> bool:
    """Whether a metric compares sets of images."""
    return "fid" in name or name == "inception_score"


def _load(network: nn.Module, weights: str, metric: str) -> None:
    """All weights of the network from a file, which may keep them under params."""
    try:
        content = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any step of its reader
        raise ValueError(
            f"weights: expected weights of {metric}, got {weights}, which is damaged or holds more "
            "than tensors"
        ) from error
    inside = content.get("params", content) if isinstance(content, Mapping) else {}
    found = {str(key).removeprefix("module."): value for key, value in inside.items()}
    wanted = network.state_dict()
    for kind, keys in (("lacks", wanted.keys() - found), ("also holds", found.keys() - wanted)):
        if keys:
            raise ValueError(
                f"weights: expected all weights of {metric} and no others, got {weights}, which "
                f"{kind} {first_keys(keys)}"
            )
    wrong = [key for key, value in wanted.items() if _shape(found[key]) != value.shape]
    if wrong:
        raise ValueError(
            f"weights: expected the shapes of {metric}, got {weights} with another one for "
            f"{first_keys(wrong)}"
        )
    network.load_state_dict(found)


def _shape(value: object) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


@contextlib.contextmanager
def _offline(*, keep_backbones: bool) -> Iterator[None]:
    """Libraries cannot download, and unpickle nothing but weights, while inside.

    Args:
        keep_backbones: let timm look for pretrained weights in its cache; else its networks begin
            empty, to be filled from the metric's file.
    """
    import urllib.request

    import huggingface_hub.constants
    import timm
    from pyiqa.utils import download_util

    read, create = torch.load, timm.create_model

    def read_weights(*args: Any, **options: Any) -> Any:
        return read(*args, **{**options, "weights_only": True})

    def create_empty(*args: Any, **options: Any) -> Any:
        return create(*args, **{**options, "pretrained": False})

    with (
        _replaced(torch.hub, "download_url_to_file", _refuse_file),
        _replaced(download_util, "download_url_to_file", _refuse_file),
        _replaced(urllib.request, "urlopen", _refuse_url),
        _replaced(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        _replaced(torch, "load", read_weights),
        _replaced(timm, "create_model", create if keep_backbones else create_empty),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        yield


@contextlib.contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def _refuse_file(url: str, dst: str, *_: object, **__: object) -> NoReturn:
    raise FileNotFoundError(f"weights: expected {dst} (published at {url}), got nothing there")


def _refuse_url(url: Any, *_: object, **__: object) -> NoReturn:
    raise FileNotFoundError(f"weights: expected what is published at {url} in its library's cache")
