"""Which towers a judge uses: of open_clip or transformers, from local files or by published names.

    model: ViT-L-14-quickgelu, pretrained: FILE     open_clip's architecture, weights from a file
    model: ViT-L-14-quickgelu, pretrained: openai   the same, weights by a tag of open_clip; this
                                                    tag is the default where there is one
    model: local-dir:FOLDER, or hf-hub:OWNER/NAME   open_clip's own folders
    model: FOLDER, or OWNER/NAME                    a CLIP of transformers

A file or a folder needs no network, but for architectures whose tokenizer has a name of the hub.
Tags and names of the hub are fetched by their library the first time, because they were asked for,
and are read from its cache where the hub does not answer. OpenAI's weights want an architecture
that ends in -quickgelu, which a file cannot tell.
"""

import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch

from argrpo.devices import DTYPES
from argrpo.hub_reach import HubOutOfReachError, hub_within_reach
from argrpo.rewards.sharing import SharedNetworks
from argrpo.rewards.tower_networks import OpenClipNetwork, TransformersNetwork
from argrpo.rewards.towers import Tower, TowerNetwork

_FOLDER, _HUB = "local-dir:", "hf-hub:"
_HUB_ID = re.compile(r"[\w-]+/[\w.-]+")
_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


class TowerOptions(NamedTuple):
    """What decides which network a tower is."""

    model: str
    pretrained: str | None = None  # None: `model` has the weights, or they are OpenAI's
    tokenizer: str | None = None  # of a CLIP of transformers whose folder has none
    dtype: str = "float32"
    offload: bool = False  # keep the weights on the CPU between steps


def load_tower(options: TowerOptions, shared: SharedNetworks, device: torch.device) -> Tower:
    """A tower, the same one for all that ask for it alike.

    Raises:
        ValueError: no such architecture, tag or dtype, or files of something else, by option.
        FileNotFoundError: a file is missing.
    """
    if options.dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {options.dtype!r}")
    chosen = _completed(options)

    def load() -> Tower:
        dtype = DTYPES[chosen.dtype]
        return Tower(_network(chosen), device=device, dtype=dtype, offload=chosen.offload)

    return shared.once((Tower, chosen, device), load)


def _completed(options: TowerOptions) -> TowerOptions:
    tags = open_clip.list_pretrained_tags_by_model(options.model)
    is_open = options.pretrained is None and "openai" in tags
    return options._replace(pretrained="openai") if is_open else options


def _network(options: TowerOptions) -> TowerNetwork:
    model, pretrained = options.model, options.pretrained
    if model.startswith((_FOLDER, _HUB)):
        if pretrained is not None:
            raise ValueError(f"pretrained: expected none beside {model}, got {pretrained!r}")
        published = model.removeprefix(_HUB) if model.startswith(_HUB) else None
        with _said_of("model", model, published, f"give {_FOLDER} and the path of its folder"):
            return OpenClipNetwork(model, None)
    if model in open_clip.list_models():
        _check_weights(model, pretrained)
        weights, tokenizer = _published(model, str(pretrained))
        remedy = "give the path of its file of weights"
        if tokenizer is not None:
            remedy = f"give {_FOLDER} and the path of a folder with a tokenizer as {tokenizer}"
        source = str(pretrained) if weights is None else f"the tag {pretrained}"
        with _said_of("pretrained", source, weights or tokenizer, remedy):
            return OpenClipNetwork(model, pretrained)
    if pretrained is None and (Path(model).is_dir() or _HUB_ID.fullmatch(model)):
        tokenizer = options.tokenizer or model
        _check_folder(model, tokenizer)
        named = [name for name in (model, tokenizer) if not Path(name).is_dir()]
        option = "tokenizer" if named == [options.tokenizer] else "model"
        published = named[0] if named else None
        with _said_of(option, published or model, published, "give the path of its folder"):
            return TransformersNetwork(model, tokenizer)
    wanted = "an open_clip architecture"
    if pretrained is None:
        wanted += ", a folder with a CLIP of transformers, or its name on the hub"
    raise ValueError(f"model: expected {wanted}, got {model!r}")


def _published(model: str, pretrained: str) -> tuple[str | None, str | None]:
    """The repositories of an architecture's weights and tokenizer, None where it needs none."""
    described: Mapping[str, Any] = open_clip.get_model_config(model)
    tokenizer: str | None = described["text_cfg"].get("hf_tokenizer_name")
    if Path(pretrained).is_file():
        return None, tokenizer
    source: str = open_clip.get_pretrained_cfg(model, pretrained)["hf_hub"]
    return source.rpartition("/")[0], tokenizer


def _check_weights(model: str, pretrained: str | None) -> None:
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is None or (not Path(pretrained).is_file() and pretrained not in tags):
        raise ValueError(
            f"pretrained: expected a file or one of {', '.join(tags) or 'no tag'} for {model}, "
            f"got {pretrained!r}"
        )


def _check_folder(model: str, tokenizer: str) -> None:
    """Refuse a folder that lacks a file; what is no folder is a name on the hub."""
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise FileNotFoundError(
            f"model: expected config.json and weights of a CLIP of transformers, as published in "
            f"openai/clip-vit-base-patch32, got {model} without config.json"
        )
    folder = Path(tokenizer)
    if folder.is_dir() and not any(
        all((folder / name).is_file() for name in names) for names in _TOKENIZER_FILES
    ):
        raise FileNotFoundError(
            f"tokenizer: expected tokenizer.json, or vocab.json and merges.txt, as published in "
            f"openai/clip-vit-base-patch32, got {tokenizer} without them"
        )


@contextmanager
def _said_of(option: str, source: str, published: str | None, remedy: str) -> Iterator[None]:
    """A library's complaint about files, as one line under the name of an option.

    Args:
        option: that holds `source`.
        source: as it was given.
        published: the repository that is fetched where it is not cached; None: nothing is.
        remedy: what to do where it cannot be fetched.
    """
    try:
        with nullcontext() if published is None else hub_within_reach():
            yield
    except HubOutOfReachError as error:
        raise ValueError(
            f"{option}: expected {source} in the cache or fetched, got neither, because {error} "
            f"does not answer; fetch {published} elsewhere, and {remedy}"
        ) from error
    except pickle.UnpicklingError as error:
        # torch's own words advise to let the file run code.
        raise ValueError(
            f"{option}: expected weights, got {source}, which is damaged or holds more than tensors"
        ) from error
    except (RuntimeError, OSError, KeyError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{option}: expected towers that can be loaded, got {source}: {reason[:300]}"
        ) from error
