"""`argrpo convert`: a model in the form that another code reads, and out of taming's form.

`FORMS` lists them. What is converted is a policy or a tokenizer; of a folder that holds both,
AR-GRPO's, `part` says which.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from argrpo.models.checkpoint_files import Checkpoint, read_checkpoint, write_folder
from argrpo.models.image_policy import ImagePolicy
from argrpo.models.llamagen import LlamaGen
from argrpo.models.llamagen_files import (
    argrpo_folder,
    hub_policy_config,
    hub_tokenizer_config,
    policy_state_dict,
    size_name,
    tokenizer_state_dict,
)
from argrpo.models.loading import load_policy, load_tokenizer, save_policy, save_tokenizer
from argrpo.models.pairing import check_pair
from argrpo.models.policy_config import ARGRPO_TEXT_PADDING
from argrpo.models.taming import Taming
from argrpo.models.taming_files import (
    project_yaml,
    read_taming_checkpoint,
    taming_policy,
    taming_state_dict,
    taming_tokenizer,
)
from argrpo.models.taming_project import TamingProject
from argrpo.models.vq import VQTokenizer
from argrpo.run_folder import write_atomically

Policy = TypeVar("Policy", LlamaGen, Taming)


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a caller says of a model that its file does not."""

    image_size: int | None = None
    """Pixels a side of a policy."""

    num_heads: int | None = None
    """Attention heads of a policy, where its width is none of the published ones."""

    downsample: int = 16
    """Pixels a side of one token."""

    text_padding: Literal["left", "right"] | None = None
    """Where padding stands in the texts of a text-conditional policy."""

    part: Literal["policy", "tokenizer"] | None = None
    """Which of the two, of a folder that holds both; None takes the policy."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Of what is written; None: as it was read."""


class Form(NamedTuple):
    """A form that models can be written in."""

    arguments: tuple[str, ...]
    help: str
    convert: Callable[[list[Path], ReadOptions], list[str]]


def convert(form: str, paths: list[str], options: ReadOptions) -> list[str]:
    """Convert a model; returns what was written, in lines.

    Args:
        form: one of `FORMS`.
        paths: what the form takes; the last is written.
        options: what the files do not say.

    Raises:
        ValueError: another number of paths, a model that the form cannot hold, or a file that
            argrpo cannot read; the message names it.
        FileNotFoundError: nothing stands at a path.
        OSError: it cannot be written; nothing is left behind.
    """
    chosen = FORMS[form]
    if len(paths) != len(chosen.arguments):
        raise ValueError(
            f"convert {form}: expected {' '.join(chosen.arguments)}, got {len(paths)} paths"
        )
    output = Path(paths[-1])
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: expected nothing there yet, got something")
    return chosen.convert([Path(path) for path in paths], options)


def _from_taming(paths: list[Path], options: ReadOptions) -> list[str]:
    source, yaml, output = paths
    project = TamingProject(yaml)
    checkpoint = read_taming_checkpoint(source)
    dtype = _dtype(checkpoint, options)
    tokenizer = taming_tokenizer(checkpoint, project, dtype)
    policy = taming_policy(checkpoint, project, dtype)
    check_pair(policy, tokenizer)
    return _both_or_nothing(output, policy, tokenizer)


def _both_or_nothing(output: Path, policy: ImagePolicy, tokenizer: VQTokenizer) -> list[str]:
    try:
        save_policy(policy, output / "policy")
        save_tokenizer(tokenizer, output / "tokenizer")
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    return [f"{output / 'policy'}: policy", f"{output / 'tokenizer'}: tokenizer"]


def _to_folder(paths: list[Path], options: ReadOptions) -> list[str]:
    source, output = paths
    model = _read(source, options)
    if isinstance(model, VQTokenizer):
        save_tokenizer(model, output)
        return [f"{output}: tokenizer"]
    save_policy(model, output)
    return [f"{output}: policy"]


def _to_llamagen(paths: list[Path], options: ReadOptions) -> list[str]:
    source, output = paths
    model = _read(source, options)
    if isinstance(model, VQTokenizer):
        _save_file({"model": tokenizer_state_dict(model)}, output)
        return [f"{output}: tokenizer; LlamaGen reads it as --vq-ckpt"]
    policy = _of_kind(model, LlamaGen, source)
    _save_file({"model": policy_state_dict(policy)}, output)
    return [f"{output}: policy; LlamaGen reads it as --gpt-ckpt{_size_flags(policy)}"]


def _to_hub(paths: list[Path], options: ReadOptions) -> list[str]:
    source, output = paths
    model = _read(source, options)
    if isinstance(model, VQTokenizer):
        write_folder(output, tokenizer_state_dict(model), hub_tokenizer_config(model.config))
        return [f"{output}: tokenizer; VQModelHF.from_pretrained reads it"]
    policy = _of_kind(model, LlamaGen, source)
    write_folder(output, policy_state_dict(policy), hub_policy_config(policy.config))
    return [f"{output}: policy; TransformerHF.from_pretrained reads it"]


def _to_argrpo(paths: list[Path], options: ReadOptions) -> list[str]:
    policy, tokenizer = _read_pair(paths, options, LlamaGen)
    folder = argrpo_folder(policy, tokenizer)
    write_folder(paths[-1], folder.weights, folder.config)
    line = f"{paths[-1]}: policy and tokenizer; ImgGen_HF.from_pretrained reads it"
    sizes = policy.config
    if sizes.model_type == "t2i" and sizes.text_padding != ARGRPO_TEXT_PADDING:
        line += (
            f"; texts are padded on the {ARGRPO_TEXT_PADDING} there, this policy had them on the "
        )
        line += sizes.text_padding
    return [line]


def _to_taming(paths: list[Path], options: ReadOptions) -> list[str]:
    policy, tokenizer = _read_pair(paths, options, Taming)
    output = paths[-1]
    project = project_yaml(policy.config, tokenizer.config)
    try:
        file = output / "configs" / "argrpo-project.yaml"
        write_atomically(file, lambda part: part.write_text(project, encoding="utf-8"))
        weights = taming_state_dict(policy, tokenizer)
        _save_file({"state_dict": weights}, output / "checkpoints" / "last.ckpt")
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    return [f"{output}: policy and tokenizer; taming's scripts/sample_fast.py reads it as -r"]


def _read(path: Path, options: ReadOptions) -> ImagePolicy | VQTokenizer:
    """The policy or tokenizer at a path, in the dtype that is to be written."""
    checkpoint = read_checkpoint(path)
    dtype = _dtype(checkpoint, options)
    if options.part == "tokenizer" or "quantize.embedding.weight" in checkpoint.weights:
        return load_tokenizer(path, dtype=dtype)
    return load_policy(
        path,
        image_size=options.image_size,
        num_heads=options.num_heads,
        downsample=options.downsample,
        text_padding=options.text_padding,
        dtype=dtype,
    )


def _read_pair(
    paths: list[Path], options: ReadOptions, kind: type[Policy]
) -> tuple[Policy, VQTokenizer]:
    policy = _read(paths[0], options)
    if isinstance(policy, VQTokenizer):
        raise ValueError(f"{paths[0]}: expected a policy, got a tokenizer; the policy comes first")
    chosen = _of_kind(policy, kind, paths[0])
    tokenizer = load_tokenizer(paths[1], dtype=chosen.head_weight.dtype)
    check_pair(chosen, tokenizer)
    return chosen, tokenizer


def _of_kind(policy: ImagePolicy, kind: type[Policy], path: Path) -> Policy:
    if not isinstance(policy, kind):
        raise ValueError(
            f"{path}: expected a {kind.__name__} policy, which this form is for, got a "
            f"{type(policy).__name__}"
        )
    return policy


def _dtype(checkpoint: Checkpoint, options: ReadOptions) -> torch.dtype:
    """What to write: as asked, else as most weights are."""
    if options.dtype is not None:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[options.dtype]
    largest = max(checkpoint.weights.values(), key=Tensor.numel, default=torch.zeros(0))
    return largest.dtype if largest.is_floating_point() else torch.float32


def _size_flags(policy: LlamaGen) -> str:
    """The flags of LlamaGen's scripts that build this policy."""
    config = policy.config
    name = size_name(config)
    size = f"--gpt-model {name}" if name else "a Transformer of its sizes (no --gpt-model has them)"
    return (
        f" with {size} --gpt-type {config.model_type} --image-size {config.image_size} "
        f"--downsample-size {config.downsample} --cls-token-num {config.prefix_len}"
        f"{' --no-left-padding' if config.text_padding == 'right' else ''}"
    )


def _save_file(content: Mapping[str, object], path: Path) -> None:
    def write(part: Path) -> None:
        try:
            torch.save(content, part)
        except RuntimeError as error:  # its form of a full disk
            raise OSError(f"no room for it, or an error of PyTorch's: {error}") from error

    write_atomically(path, write)


FORMS = {
    "taming": Form(
        ("CKPT", "YAML", "OUT"), "a checkpoint of taming -> OUT/policy, OUT/tokenizer", _from_taming
    ),
    "folder": Form(("IN", "OUT"), "what argrpo reads -> a folder of argrpo", _to_folder),
    "llamagen": Form(("IN", "OUT.pt"), "-> a file for LlamaGen's own scripts", _to_llamagen),
    "llamagen_hub": Form(("IN", "OUT"), "-> a folder for LlamaGen's hub code", _to_hub),
    "argrpo": Form(("POLICY", "TOKENIZER", "OUT"), "-> a folder for AR-GRPO's code", _to_argrpo),
    "taming_transformers": Form(
        ("POLICY", "TOKENIZER", "OUT"), "-> a run folder for taming's own scripts", _to_taming
    ),
}
"""The forms by name: `taming` is read, the others are written."""
