"""Checkpoints of every kind: read whole, refused by name, written whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from argrpo.models.llamagen import LlamaGen
from argrpo.models.loading import load_policy, load_tokenizer, save_policy, save_tokenizer
from argrpo.models.vq import VQTokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = GOLDEN / "llamagen_c2i" / "small_model.pt"
ARGRPO = GOLDEN / "argrpo_hf_checkpoint"
VQ = GOLDEN / "vq_tokenizer" / "vq.pt"

# All files of the case hold the same bf16-representable weights.
WRAPPINGS = ["model", "module", "state_dict", "bare", "training", "compiled"]
# The reference's own fp32 error is 3e-6; the rest is for another order of summation.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def published(path: Path = SMALL) -> dict[str, Tensor]:
    return dict(torch.load(path, weights_only=True)["model"])


def load_small(path: Path) -> LlamaGen:
    return load_policy(path, image_size=64, num_heads=2)


def assert_same_weights(got: torch.nn.Module, expected: torch.nn.Module) -> None:
    mine, theirs = got.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []


@pytest.fixture(scope="module")
def policy() -> LlamaGen:
    return load_small(SMALL)


@pytest.fixture(scope="module")
def tokenizer() -> VQTokenizer:
    return load_tokenizer(VQ)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_gives_the_same_policy(wrapping: str, policy: LlamaGen) -> None:
    loaded = load_small(GOLDEN / "llamagen_c2i" / f"small_{wrapping}.pt")
    assert loaded.config == policy.config
    assert_same_weights(loaded, policy)


@pytest.mark.parametrize("folder", ["plain", "with_reference"])
@torch.no_grad()
def test_an_argrpo_folder_holds_policy_and_tokenizer(
    folder: str, policy: LlamaGen, tokenizer: VQTokenizer
) -> None:
    loaded = load_policy(ARGRPO / folder, num_heads=2)
    assert (loaded.config.image_size, loaded.config.downsample) == (8, 2)
    assert_same_weights(loaded, policy)
    expected = load_file(GOLDEN / "llamagen_c2i" / "small_expected.safetensors")
    logits = loaded.logits(expected["labels"], expected["token_ids"], guidance_scale=2.0)
    torch.testing.assert_close(logits, expected["logits_cfg2"], **TOLERANCE)
    assert_same_weights(load_tokenizer(ARGRPO / folder), tokenizer)


def test_a_sharded_argrpo_folder_is_read_through_its_index(
    tmp_path: Path, policy: LlamaGen
) -> None:
    weights = load_file(ARGRPO / "with_reference" / "model.safetensors")
    shards = {
        "model-1.safetensors": sorted(weights)[::2],
        "model-2.safetensors": sorted(weights)[1::2],
    }
    for name, keys in shards.items():
        save_file({key: weights[key] for key in keys}, tmp_path / name)
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copy(ARGRPO / "plain" / "config.json", tmp_path)
    assert_same_weights(load_policy(tmp_path, num_heads=2), policy)

    more = {**weight_map, "gpt_model.more": "model-1.safetensors"}
    index.write_text(json.dumps({"weight_map": more}))
    with pytest.raises(ValueError, match=r"every key of .* in a shard.* gpt_model\.more"):
        load_policy(tmp_path, num_heads=2)
    index.write_text(json.dumps({"weight_map": {"gpt_model.more": "../model.safetensors"}}))
    with pytest.raises(ValueError, match=r"expected shards beside it, got '\.\./model"):
        load_policy(tmp_path, num_heads=2)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors: expected in a checkpoint"):
        load_policy(tmp_path, num_heads=2)


def test_a_hub_tokenizer_folder_is_read(tmp_path: Path, tokenizer: VQTokenizer) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"codebook_size": 512}))
    save_file(published(VQ), tmp_path / "model.safetensors")
    assert_same_weights(load_tokenizer(tmp_path), tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_policy_comes_back_bit_for_bit(
    dtype: torch.dtype, tmp_path: Path, policy: LlamaGen
) -> None:
    folder = tmp_path / "runs" / "policy"
    torch.manual_seed(1)
    saved = LlamaGen(policy.config).to(dtype)
    save_policy(saved, folder)
    loaded = load_policy(folder, dtype=dtype)
    assert loaded.config == saved.config
    assert_same_weights(loaded, saved)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert os.listdir(folder.parent) == ["policy"]
    on_disk = load_file(folder / "model.safetensors")
    assert on_disk.keys() == published().keys(), "the names on disk are the published ones"


def test_a_saved_text_policy_comes_back(tmp_path: Path) -> None:
    saved = load_policy(GOLDEN / "llamagen_t2i" / "model.pt", image_size=64, num_heads=2)
    assert (saved.config.prefix_len, saved.config.caption_dim) == (8, 32)
    save_policy(saved, tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy")
    assert loaded.config == saved.config
    assert_same_weights(loaded, saved)


def test_a_folder_says_where_padding_stands_and_a_caller_may_choose_anew(tmp_path: Path) -> None:
    text = GOLDEN / "llamagen_t2i" / "model.pt"
    saved = load_policy(text, image_size=64, num_heads=2, text_padding="right")
    save_policy(saved, tmp_path / "policy")
    assert load_policy(tmp_path / "policy").config.text_padding == "right"
    assert load_policy(tmp_path / "policy", text_padding="left").config.text_padding == "left"
    with pytest.raises(ValueError, match=r"text_padding: expected left or right .* got 'middle'"):
        load_policy(tmp_path / "policy", text_padding="middle")
    with pytest.raises(ValueError, match="text_padding: expected left for a c2i policy"):
        load_policy(SMALL, image_size=64, num_heads=2, text_padding="right")


def test_a_saved_tokenizer_comes_back_bit_for_bit(tmp_path: Path, tokenizer: VQTokenizer) -> None:
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert loaded.config == tokenizer.config
    assert_same_weights(loaded, tokenizer)


def test_weights_take_the_asked_dtype_and_are_copies(tmp_path: Path, policy: LlamaGen) -> None:
    path = tmp_path / "bare.pt"
    shutil.copy(GOLDEN / "llamagen_c2i" / "small_bare.pt", path)
    loaded = load_small(path)
    path.write_bytes(bytes(path.stat().st_size))  # as another program that writes in place
    assert_same_weights(loaded, policy)
    half = load_policy(SMALL, image_size=64, num_heads=2, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.rotary.dtype == torch.float32
    assert load_tokenizer(VQ, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype: expected float32, .* got torch\.int8"):
        load_policy(SMALL, image_size=64, num_heads=2, dtype=torch.int8)


def test_loaded_weights_train(policy: LlamaGen) -> None:
    assert all(p.requires_grad and p.is_leaf and not p.is_meta for p in policy.parameters())


def test_an_old_torch_file_without_a_zip_is_read(tmp_path: Path, policy: LlamaGen) -> None:
    path = tmp_path / "old.pt"
    torch.save({"model": published()}, path, _use_new_zipfile_serialization=False)
    assert_same_weights(load_small(path), policy)


def test_a_safetensors_file_is_read(tmp_path: Path, policy: LlamaGen) -> None:
    save_file(published(), tmp_path / "policy.safetensors")
    assert_same_weights(load_small(tmp_path / "policy.safetensors"), policy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update(bias=w["norm.weight"]), "expected known keys only, got bias"),
        (
            lambda w: w.update({f"extra.{i}": w["norm.weight"] for i in range(5)}),
            r"got extra\.0, extra\.1, extra\.2 and 2 more",
        ),
        (lambda w: w.pop("norm.weight"), r"expected norm\.weight, got no such key"),
        (lambda w: w.pop("tok_embeddings.weight"), r"got no tok_embeddings\.weight beside"),
        (
            lambda w: w.update({"layers.2.ffn_norm.weight": w["norm.weight"]}),
            r"got layers\.2\.ffn_norm\.weight",
        ),
        (
            lambda w: w.update({"norm.weight": torch.ones(64)}),
            r"norm\.weight: expected \[128\], got \[64\]",
        ),
        (
            lambda w: w.update({"layers.0.feed_forward.w3.weight": torch.ones(32, 128)}),
            r"layers\.0\.feed_forward\.w3\.weight: expected \[64, 128\], got \[32, 128\]",
        ),
        (
            lambda w: w.update({"tok_embeddings.weight": torch.ones(128)}),
            r"tok_embeddings\.weight: expected a matrix, got \[128\]",
        ),
        (
            lambda w: w.update({"norm.weight": torch.ones(128, dtype=torch.int8)}),
            r"norm\.weight: expected floating point, got torch\.int8",
        ),
        (
            lambda w: w.update({"module.norm.weight": w["norm.weight"]}),
            r"expected every weight once, got two for norm\.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_key(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    weights = published()
    change(weights)
    torch.save({"model": weights}, tmp_path / "policy.pt")
    with pytest.raises(ValueError, match=message) as refusal:
        load_small(tmp_path / "policy.pt")
    assert str(tmp_path / "policy.pt") in str(refusal.value)


def test_policy_and_tokenizer_are_not_mixed_up(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a policy, got a tokenizer; use load_tokenizer"):
        load_policy(VQ, image_size=64)
    with pytest.raises(ValueError, match="expected a tokenizer, got a policy; use load_policy"):
        load_tokenizer(SMALL)
    with pytest.raises(ValueError, match=r"unused\.weight"):
        weights = {**published(VQ), "unused.weight": torch.ones(1)}
        torch.save({"model": weights}, tmp_path / "vq.pt")
        load_tokenizer(tmp_path / "vq.pt")
    with pytest.raises(ValueError, match=r"vq\.pt: quant_conv\.weight: expected in a tokenizer"):
        weights = {k: v for k, v in published(VQ).items() if k != "quant_conv.weight"}
        torch.save({"model": weights}, tmp_path / "vq.pt")
        load_tokenizer(tmp_path / "vq.pt")


def test_an_unknown_part_of_an_argrpo_folder_is_refused(tmp_path: Path) -> None:
    weights = load_file(ARGRPO / "plain" / "model.safetensors")
    save_file({**weights, "text.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    shutil.copy(ARGRPO / "plain" / "config.json", tmp_path)
    with pytest.raises(
        ValueError, match=r"keys under gpt_model\., vq_model\., .* got text\.weight"
    ):
        load_policy(tmp_path, num_heads=2)
