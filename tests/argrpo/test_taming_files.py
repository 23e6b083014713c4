"""Checkpoints of taming-transformers: golden numbers, nothing in them runs, and back again."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from argrpo.models.checkpoint_files import Checkpoint, read_checkpoint
from argrpo.models.loading import load_policy, load_tokenizer
from argrpo.models.taming_files import (
    project_yaml,
    read_taming_checkpoint,
    taming_policy,
    taming_state_dict,
    taming_tokenizer,
    vqgan_name,
)
from argrpo.models.taming_project import TamingProject
from argrpo.models.vq import VQConfig, VQTokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
NET2NET = GOLDEN / "taming_net2net"
# The reference's own fp32 error is 1e-6; convolutions sum in another order.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


class Payload:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


class _Named:
    """Pickles as a class or function of a name that is not there."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def as_class(self) -> type:
        return type(self.name, (), {"__module__": self.module, "__qualname__": self.name})


def lightning_file(path: Path, extra: dict[object, object], *, legacy: bool = False) -> Path:
    weights = {"transformer.tok_emb.weight": torch.zeros(2, 2)}
    content = {"state_dict": weights, "callbacks": extra}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.fixture
def lightning_class(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], type]:
    """A class of a package that is there while a file is written, and gone when it is read."""
    import sys
    import types

    def make(module: str, name: str) -> type:
        made = _Named(module, name).as_class()
        for depth in range(1, module.count(".") + 2):
            part = ".".join(module.split(".")[:depth])
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        setattr(sys.modules[module], name, made)
        return made

    return make


def test_codes_and_pixels_are_those_of_taming() -> None:
    project = TamingProject(NET2NET / "project.yaml")
    expected = load_file(NET2NET / "expected.safetensors")
    tokenizer = taming_tokenizer(read_taming_checkpoint(NET2NET / "last.ckpt"), project)
    assert torch.equal(tokenizer.encode(expected["images"]), expected["encoded"])
    pixels = (expected["pixels"] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(expected["token_ids"]), pixels, **TOLERANCE)


def test_what_is_written_for_taming_is_what_taming_had(tmp_path: Path) -> None:
    """The golden file was written by its own code, so keys and shapes are those of its modules."""
    project = TamingProject(NET2NET / "project.yaml")
    read = read_taming_checkpoint(NET2NET / "last.ckpt").weights
    checkpoint = read_taming_checkpoint(NET2NET / "last.ckpt")
    policy, tokenizer = taming_policy(checkpoint, project), taming_tokenizer(checkpoint, project)
    written = taming_state_dict(policy, tokenizer)
    kept = {key: weight for key, weight in read.items() if ".loss." not in key}
    assert written.keys() == kept.keys()
    for key, weight in kept.items():
        assert torch.equal(written[key], weight.float()), key
    file = tmp_path / "project.yaml"
    file.write_text(project_yaml(policy.config, tokenizer.config), encoding="utf-8")
    again = TamingProject(file)
    assert again.policy_config() == policy.config
    assert again.tokenizer_config() == tokenizer.config


def test_every_weight_of_the_published_vqgan_has_its_own_name() -> None:
    """f16, 16,384 codes; taming's Encoder and Decoder of these sizes hold 338 weights."""
    config = VQConfig(codebook_dim=256, unit_codes=False)
    with torch.device("meta"):
        keys = VQTokenizer(config).state_dict().keys()
    names = {vqgan_name(key, config) for key in keys}
    assert len(names) == len(keys) == 338 + 5  # the codebook and the two convolutions around it
    for name in (
        "encoder.down.0.block.0.norm1.weight",
        "encoder.down.3.downsample.conv.bias",
        "encoder.down.4.attn.1.proj_out.weight",
        "encoder.mid.attn_1.q.weight",
        "decoder.mid.block_2.conv1.weight",
        "decoder.up.4.attn.2.norm.bias",
        "decoder.up.1.upsample.conv.weight",
        "decoder.up.0.block.2.conv2.bias",
        "quantize.embedding.weight",
        "post_quant_conv.bias",
    ):
        assert name in names
    assert not any("conv_blocks" in name or ".res." in name for name in names)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_objects_of_lightning_are_read_as_nothing(
    legacy: bool, tmp_path: Path, lightning_class: Callable[[str, str], type]
) -> None:
    callback = lightning_class("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    mapping = lightning_class("pytorch_lightning.utilities.parsing", "AttributeDict")
    instance = callback()
    instance.best = torch.ones(2)
    settings = type("AttributeDict", (dict,), {"__module__": mapping.__module__})
    import sys

    sys.modules[mapping.__module__].AttributeDict = settings
    extra = {callback: {"score": torch.ones(1)}, "an instance": instance, "h": settings(lr=1.0)}
    path = lightning_file(tmp_path / "last.ckpt", extra, legacy=legacy)
    weights = read_taming_checkpoint(path).weights
    assert torch.equal(weights["transformer.tok_emb.weight"], torch.zeros(2, 2))
    with pytest.raises(
        ValueError, match=r"global pytorch_lightning\..*argrpo convert taming reads"
    ):
        read_checkpoint(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, r"(posix|os)\.system"),
        (eval, "eval"),
        (exec, "exec"),
        (shutil.rmtree, "shutil.rmtree"),
        (getattr, "getattr"),
        (torch.hub.load, "torch.hub.load"),
        (torch.load, "torch.serialization.load"),
    ],
    ids=["system", "eval", "exec", "rmtree", "getattr", "hub", "load"],
)
def test_what_would_run_is_refused_by_its_name(
    function: Callable[..., object],
    name: str,
    legacy: bool,
    tmp_path: Path,
    lightning_class: Callable[[str, str], type],
) -> None:
    marker = tmp_path / "it ran"
    callback = lightning_class("pytorch_lightning.callbacks", "ModelCheckpoint")
    # Beside an object that is let through, and inside its arguments.
    call = Payload(function, f"touch '{marker}'")
    extra = {callback: {"state": call}, "nested": Payload(callback, call)}
    path = lightning_file(tmp_path / "last.ckpt", extra, legacy=legacy)
    with pytest.raises(ValueError, match=rf"{name}, which could run code"):
        read_taming_checkpoint(path)
    assert not marker.exists()


def test_a_function_that_hides_in_lightnings_name_runs_as_nothing(
    tmp_path: Path, lightning_class: Callable[[str, str], type]
) -> None:
    """Whatever is installed under that name is never looked up."""
    ran: list[object] = []
    made = lightning_class("pytorch_lightning.utilities.cloud", "system")
    made.__init__ = lambda self, *words: ran.append(words)  # type: ignore[misc]
    path = lightning_file(tmp_path / "last.ckpt", {"call": Payload(made, "touch x")})
    ran.clear()
    read_taming_checkpoint(path)
    assert ran == []


def test_files_that_are_no_taming_checkpoint_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="expected a checkpoint of a taming transformer"):
        read_taming_checkpoint(tmp_path / "other.ckpt")
    whole = (NET2NET / "last.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[:-2000])
    with pytest.raises(ValueError, match="expected a whole torch checkpoint, got a damaged one"):
        read_taming_checkpoint(tmp_path / "cut.ckpt")
    with pytest.raises(FileNotFoundError):
        read_taming_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("transformer.blocks.0.attn.key.bias", None), "expected blocks.0.attn.key.bias, got no"),
        (("transformer.blocks.0.extra", torch.zeros(1)), "known keys only, got blocks.0.extra"),
        (("transformer.pos_emb", torch.zeros(1, 15, 32)), r"pos_emb: expected \[1, 16, 32\]"),
        (("transformer.head.weight", torch.zeros(32, 32).long()), "expected floating point"),
    ],
)
def test_a_transformer_that_is_not_the_projects_is_refused_by_key(
    change: tuple[str, torch.Tensor | None], message: str
) -> None:
    project = TamingProject(NET2NET / "project.yaml")
    checkpoint = read_taming_checkpoint(NET2NET / "last.ckpt")
    weights = {**checkpoint.weights, change[0]: change[1]}
    damaged = {key: weight for key, weight in weights.items() if weight is not None}
    with pytest.raises(ValueError, match=message):
        taming_policy(Checkpoint(NET2NET, damaged, None), project)


@pytest.mark.parametrize("load", [load_policy, load_tokenizer])
def test_a_checkpoint_that_was_not_converted_names_the_command(
    load: Callable[[Path], object], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="argrpo convert taming"):
        load(NET2NET / "last.ckpt")
    # Without an object of Lightning, as the other golden file.
    with pytest.raises(ValueError, match="argrpo convert taming"):
        load(GOLDEN / "taming_transformer" / "last.ckpt")
