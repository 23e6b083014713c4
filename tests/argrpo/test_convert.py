"""`argrpo convert` by its command line: each form, read back, and what it refuses."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import argrpo.convert
from argrpo.cli import main
from argrpo.exit_codes import DONE, MACHINE, WRONG_INPUT
from argrpo.models.checkpoint_files import read_checkpoint
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.llamagen_files import ArgrpoFolder
from argrpo.models.loading import load_policy, load_tokenizer, save_policy, save_tokenizer
from argrpo.models.taming import Taming
from argrpo.models.vq import VQConfig, VQTokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
NET2NET = GOLDEN / "taming_net2net"
MAIN = GOLDEN / "llamagen_c2i" / "main.pt"
SIZES = ("--image_size", "128", "--num_heads", "2")


def convert(*words: object) -> int:
    return main(["convert", *map(str, words)])


@pytest.fixture(scope="module")
def taming(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taming") / "out"
    assert convert("taming", NET2NET / "last.ckpt", NET2NET / "project.yaml", folder) == DONE
    return folder


@pytest.fixture(scope="module")
def vq16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that LlamaGen's code can build: 128 channels."""
    one = (1,)
    config = VQConfig(codebook_size=64, encoder_multipliers=one, decoder_multipliers=one)
    folder = tmp_path_factory.mktemp("vq") / "vq"
    save_tokenizer(VQTokenizer(config).bfloat16(), folder)
    return folder


def test_a_taming_checkpoint_becomes_a_policy_and_a_tokenizer(taming: Path) -> None:
    policy, tokenizer = load_policy(taming / "policy"), load_tokenizer(taming / "tokenizer")
    assert isinstance(policy, Taming)
    expected = load_file(NET2NET / "expected.safetensors")
    with torch.no_grad():
        logits = policy.logits(expected["classes"], expected["token_ids"])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=1e-4)
    assert torch.equal(tokenizer.encode(expected["images"]), expected["encoded"])
    # The file is bf16, and what is written is as it was read.
    assert read_checkpoint(taming / "policy").weights["pos_emb"].dtype == torch.bfloat16


def test_what_goes_back_to_taming_is_the_file_it_came_from(taming: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    assert convert("taming_transformers", taming / "policy", taming / "tokenizer", back) == DONE
    project = back / "configs" / "argrpo-project.yaml"
    again = tmp_path / "again"
    assert convert("taming", back / "checkpoints" / "last.ckpt", project, again) == DONE
    for part in ("policy", "tokenizer"):
        one, other = (read_checkpoint(folder / part) for folder in (taming, again))
        assert one.config == other.config
        assert all(torch.equal(weight, other.weights[key]) for key, weight in one.weights.items())


@pytest.mark.parametrize("form", ["llamagen", "llamagen_hub", "folder"])
def test_a_policy_is_the_same_in_every_form(form: str, tmp_path: Path) -> None:
    output = tmp_path / ("out.pt" if form == "llamagen" else "out")
    assert convert(form, MAIN, output, *SIZES) == DONE
    original = load_policy(MAIN, image_size=128, num_heads=2)
    given = {"image_size": 128, "num_heads": 2} if form == "llamagen" else {}
    read = load_policy(output, **given)
    assert isinstance(read, LlamaGen)
    assert read.config == original.config
    for name, weight in original.named_parameters():
        assert torch.equal(dict(read.named_parameters())[name], weight), name


@pytest.mark.parametrize("form", ["llamagen", "llamagen_hub", "folder"])
def test_a_tokenizer_is_the_same_in_every_form(form: str, vq16: Path, tmp_path: Path) -> None:
    output = tmp_path / ("out.pt" if form == "llamagen" else "out")
    assert convert(form, vq16, output) == DONE
    read, original = load_tokenizer(output), load_tokenizer(vq16)
    assert read.config == original.config
    for key, weight in original.state_dict().items():
        assert torch.equal(read.state_dict()[key], weight), key


def test_a_file_for_llamagen_is_wrapped_and_typed_as_its_own(tmp_path: Path) -> None:
    assert convert("llamagen", MAIN, tmp_path / "out.pt", *SIZES, "--dtype", "float32") == DONE
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(content) == ["model"], "the wrapping that its sampling scripts look for first"
    assert {weight.dtype for weight in content["model"].values()} == {torch.float32}


def test_either_part_of_an_argrpo_folder_can_be_taken(tmp_path: Path) -> None:
    source = GOLDEN / "argrpo_hf_checkpoint" / "with_reference"
    sizes = ("--num_heads", "2")
    assert convert("folder", source, tmp_path / "policy", *sizes) == DONE
    assert convert("folder", source, tmp_path / "vq", "--part", "tokenizer") == DONE
    plain = GOLDEN / "argrpo_hf_checkpoint" / "plain"
    expected = load_policy(plain, num_heads=2).state_dict()
    for key, weight in load_policy(tmp_path / "policy").state_dict().items():
        assert torch.equal(weight, expected[key]), key
    assert load_tokenizer(tmp_path / "vq").config == load_tokenizer(plain).config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("llamagen", "{taming}/policy", "{out}"), "expected a LlamaGen policy, which this form"),
        (("llamagen", "{taming}/tokenizer", "{out}"), "tokenizer: expected codes of unit length"),
        (("taming_transformers", MAIN, "{vq16}", "{out}", *SIZES), "expected a Taming policy"),
        (
            ("taming_transformers", "{vq16}", "{vq16}", "{out}"),
            "expected a policy, got a tokenizer",
        ),
        (("argrpo", MAIN, "{vq16}", "{out}", *SIZES), "expected a codebook of 512, as the policy"),
        (("llamagen", MAIN, "{out}"), "num_heads: expected for width 128"),
        (("llamagen", MAIN, "{taming}", *SIZES), "expected nothing there yet, got something"),
        (("llamagen", MAIN), r"convert llamagen: expected IN OUT.pt, got 1 paths"),
        (("taming", MAIN, NET2NET / "project.yaml", "{out}"), "expected a checkpoint of a taming"),
        (
            ("taming", NET2NET / "last.ckpt", "nowhere", "{out}"),
            "nowhere: expected the project YAML",
        ),
        (("folder", "nowhere", "{out}"), "nowhere: expected a checkpoint file or folder"),
    ],
)
def test_what_a_form_cannot_hold_is_refused_in_a_line_and_nothing_is_left(
    words: tuple[object, ...],
    message: str,
    taming: Path,
    vq16: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    filled = [str(word).format(taming=taming, vq16=vq16, out=out) for word in words]
    assert convert(*filled) == WRONG_INPUT
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["taming", "taming_transformers"])
def test_a_full_disk_leaves_nothing(
    form: str, taming: Path, tmp_path: Path, files_up_to: Callable[[int], object]
) -> None:
    sources = {
        "taming": (NET2NET / "last.ckpt", NET2NET / "project.yaml"),
        "taming_transformers": (taming / "policy", taming / "tokenizer"),
    }
    with files_up_to(200_000):  # the transformer fits, the tokenizer does not
        assert convert(form, *sources[form], tmp_path / "out") == MACHINE
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_says_where_texts_are_padded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = GOLDEN / "llamagen_t2i" / "model.pt"
    sizes = ("--image_size", "64", "--num_heads", "2")
    for padding, flags in (("left", "--cls-token-num 8\n"), ("right", " --no-left-padding\n")):
        output = tmp_path / f"{padding}.pt"
        assert convert("llamagen", text, output, *sizes, "--text_padding", padding) == DONE
        assert capsys.readouterr().out.endswith(flags)
    levels = {"encoder_multipliers": (1,) * 5, "decoder_multipliers": (1,) * 5}
    codes = VQConfig(codebook_size=256, channels=32, z_channels=32, num_res_blocks=1, **levels)
    save_tokenizer(VQTokenizer(codes), tmp_path / "vq")
    # A size that AR-GRPO's code has a name for would take seconds.
    monkeypatch.setattr(argrpo.convert, "argrpo_folder", lambda *_: ArgrpoFolder({}, {}))
    for padding, note in (
        ("left", "padded on the right there, this policy had them on the left\n"),
        ("right", "ImgGen_HF.from_pretrained reads it\n"),
    ):
        words = ("argrpo", text, tmp_path / "vq", tmp_path / padding, *sizes)
        assert convert(*words, "--text_padding", padding) == DONE
        assert capsys.readouterr().out.endswith(note)


def test_what_was_trained_here_is_a_file_for_llamagen(tmp_path: Path) -> None:
    """A checkpoint's folder: packed weights are apart again, in the order that LlamaGen joins."""
    config = LlamaGenConfig(
        dim=32, num_layers=1, num_heads=2, ffn_dim=48, vocab_size=16, image_size=64, num_classes=3
    )
    policy = LlamaGen(config)
    save_policy(policy, tmp_path / "step_000001")
    assert convert("llamagen", tmp_path / "step_000001", tmp_path / "tuned.pt") == DONE
    weights = torch.load(tmp_path / "tuned.pt", weights_only=True)["model"]
    forward = policy.layers[0].feed_forward
    gate, up = forward.w13.chunk(2)
    assert torch.equal(weights["layers.0.feed_forward.w1.weight"], gate)
    assert torch.equal(weights["layers.0.feed_forward.w3.weight"], up)
