"""`argrpo sample` leaves the images that the engine drew, and refuses what it cannot draw."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image
from safetensors.torch import save_file
from small_tokenizer import write_tokenizer

from argrpo import sampling
from argrpo.encoded_texts import TextLayout
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import load_policy, load_tokenizer, save_policy, save_tokenizer
from argrpo.models.vq import VQTokenizer
from argrpo.pixels import to_uint8
from argrpo.prompt_encoding import encode_prompts
from argrpo.run_folder import StorageError
from argrpo.sample_config import SampleConfig
from argrpo.sample_prompts import labels_of
from argrpo.sampling import draw_samples
from argrpo.text_config import TextEncoderConfig


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional and a text-conditional policy of 4 x 4 tokens, and their tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64, "vocab_size": 32}
    grid = {"image_size": 16, "downsample": 4}
    save_policy(LlamaGen(LlamaGenConfig(**sizes, **grid, num_classes=10)), folder / "policy")
    text = LlamaGenConfig(**sizes, **grid, model_type="t2i", caption_dim=8, prefix_len=5)
    save_policy(LlamaGen(text), folder / "text_policy")
    write_tokenizer(folder / "tokenizer")
    features = {"features": torch.randn(3, 5, 8), "mask": torch.ones(3, 5, dtype=torch.int64)}
    prompts = json.dumps(["a cat", "a dog", "a hat"])
    save_file(features, folder / "prompts.safetensors", metadata={"prompts": prompts})
    return folder


@pytest.fixture
def config(models: Path, tmp_path: Path) -> SampleConfig:
    return SampleConfig(
        policy=str(models / "policy"),
        tokenizer=str(models / "tokenizer"),
        labels=[7, 2],
        num_images_per_prompt=3,
        guidance_scale=2.0,
        top_k=20,
        seed=5,
        device="cpu",
        output_dir=str(tmp_path / "out"),
    )


def test_tokens_and_pictures_are_those_that_the_engine_draws(config: SampleConfig) -> None:
    folder = draw_samples(config)
    policy, tokenizer = load_policy(config.policy), load_tokenizer(config.tokenizer)
    labels = torch.tensor([7, 7, 7, 2, 2, 2])
    params = config.sampling_params(config.guidance_scale)
    rollout = RolloutEngine(policy, max_slots=6).draw(labels, params, seed=5)
    assert np.array_equal(np.load(folder / "tokens.npy"), rollout.token_ids.numpy())
    pictures = to_uint8(tokenizer.decode(rollout.token_ids)).permute(0, 2, 3, 1).numpy()
    names = ["00000_class_0007", "00001_class_0007", "00002_class_0007"]
    names += ["00003_class_0002", "00004_class_0002", "00005_class_0002"]
    for name, picture in zip(names, pictures, strict=True):
        assert np.array_equal(np.asarray(Image.open(folder / f"{name}.png")), picture)
    files = {path.name for path in folder.iterdir()}
    assert files == {*(f"{name}.png" for name in names), "grid.png", "tokens.npy"}


def test_the_same_seed_draws_the_same_tokens_and_another_does_not(
    config: SampleConfig, tmp_path: Path
) -> None:
    def tokens(seed: int, name: str) -> np.ndarray:
        again = replace(config, seed=seed, output_dir=str(tmp_path / name))
        return np.load(draw_samples(again) / "tokens.npy")

    first = tokens(5, "a")
    assert np.array_equal(first, tokens(5, "b"))
    assert not np.array_equal(first, tokens(6, "c"))


def test_more_images_than_slots_are_the_same_images_and_are_told_as_they_come(
    config: SampleConfig, tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    few = replace(config, max_slots=4, output_dir=str(tmp_path / "few"))
    tokens = np.load(draw_samples(few, lambda *words: told.append(words)) / "tokens.npy")
    # Rows come in fours inside the engine, so 4 slots and 6 round alike.
    assert np.array_equal(tokens, np.load(draw_samples(config) / "tokens.npy"))
    written = [words for words in told if words[0] == "images"]
    assert written == [("images", 0, 6), ("images", 4, 6), ("images", 6, 6)]
    drawn = [words for words in told if words[0] == "tokens"]
    assert len(drawn) > len(written), "a bar that moves while images are drawn"
    assert drawn[-1][1] == drawn[-1][2]


def test_a_class_asked_for_twice_gets_files_of_its_own(config: SampleConfig) -> None:
    folder = draw_samples(replace(config, labels=[4, 4], num_images_per_prompt=1))
    assert sorted(path.name for path in folder.glob("0*.png")) == [
        "00000_class_0004.png",
        "00001_class_0004.png",
    ]


def test_a_text_policy_draws_every_encoded_prompt(config: SampleConfig, models: Path) -> None:
    text = replace(
        config,
        policy=str(models / "text_policy"),
        labels=None,
        text_features=str(models / "prompts.safetensors"),
        num_images_per_prompt=2,
        top_k=0,
    )
    folder = draw_samples(text)
    assert np.load(folder / "tokens.npy").shape == (6, 16)
    assert (folder / "00005_prompt_00002.png").is_file()


def test_right_padded_prompts_are_drawn_where_asked_for(
    config: SampleConfig, models: Path, tmp_path: Path
) -> None:
    mask = torch.arange(5) < torch.tensor([[2], [5]])
    prompts = {"features": torch.randn(2, 5, 8), "mask": mask.long()}
    save_file(prompts, tmp_path / "right.safetensors", metadata={"prompts": '["a", "a b c"]'})
    text = replace(
        config,
        policy=str(models / "text_policy"),
        labels=None,
        text_features=str(tmp_path / "right.safetensors"),
        num_images_per_prompt=1,
    )
    with pytest.raises(ValueError, match="mask: expected left padding"):
        draw_samples(text)
    folder = draw_samples(replace(text, text_padding="right"))
    assert np.load(folder / "tokens.npy").shape == (2, 16)


@pytest.fixture
def text(config: SampleConfig, tiny_t5: Path, tmp_path: Path) -> SampleConfig:
    """A policy that reads texts of the tiny encoder."""
    sizes = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64, "vocab_size": 32}
    grid = {"image_size": 16, "downsample": 4, "model_type": "t2i"}
    policy = LlamaGen(LlamaGenConfig(**sizes, **grid, caption_dim=64, prefix_len=6))
    save_policy(policy, tmp_path / "text_policy")
    return replace(
        config,
        policy=str(tmp_path / "text_policy"),
        labels=None,
        prompts=["a seven", "A small zero"],
        text_encoder=TextEncoderConfig(path=str(tiny_t5), dtype="float32"),
        num_images_per_prompt=2,
        cache_dir=str(tmp_path / "cache"),
        top_k=0,
    )


def test_prompts_are_encoded_and_drawn(text: SampleConfig, tiny_t5: Path, tmp_path: Path) -> None:
    folder = draw_samples(text)
    assert json.loads((folder / "prompts.json").read_text()) == ["a seven", "A small zero"]
    assert (folder / "00003_prompt_00001.png").is_file()
    texts = encode_prompts(
        ["a seven", "a small zero"],
        text.text_encoder,
        TextLayout(6, 64, "left"),
        device=torch.device("cpu"),
        cache_dir=tmp_path / "another_cache",
    )
    engine = RolloutEngine(load_policy(text.policy), max_slots=4)
    conditions = texts.conditions(torch.tensor([0, 0, 1, 1]))
    rollout = engine.draw(conditions, text.sampling_params(text.guidance_scale), seed=5)
    assert np.array_equal(np.load(folder / "tokens.npy"), rollout.token_ids.numpy())


def test_prompts_of_a_file_are_drawn_alike(text: SampleConfig, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("Prompt,n\na seven,1\n,2\nA small zero,3\n")
    from_file = replace(
        text,
        prompts=None,
        prompts_file=str(tmp_path / "p.csv"),
        output_dir=str(tmp_path / "from_file"),
    )
    tokens = np.load(draw_samples(from_file) / "tokens.npy")
    assert np.array_equal(tokens, np.load(draw_samples(text) / "tokens.npy"))


def test_prompts_for_a_policy_of_classes_are_refused(text: SampleConfig, models: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts: expected labels or names for .* reads no text"):
        draw_samples(replace(text, policy=str(models / "policy")))


def test_labels_for_a_policy_of_texts_and_texts_for_one_of_classes_are_refused(
    text: SampleConfig, config: SampleConfig, models: Path
) -> None:
    labels = replace(text, prompts=None, labels=[1])
    with pytest.raises(ValueError, match=r"^labels: expected prompts or prompts_file for .* reads"):
        draw_samples(labels)
    features = replace(config, labels=None, text_features=str(models / "prompts.safetensors"))
    with pytest.raises(ValueError, match=r"^text_features: expected labels or names for .* no tex"):
        draw_samples(features)
    with pytest.raises(FileNotFoundError, match=r"^text_features: expected a file, got missing"):
        draw_samples(replace(features, text_features="missing"))


def test_a_taken_folder_is_refused_before_anything_is_loaded(config: SampleConfig) -> None:
    draw_samples(config)
    with pytest.raises(ValueError, match=r"^output_dir: expected a folder without samples"):
        draw_samples(replace(config, policy="missing.pt"))


def test_prompts_without_an_encoder_or_with_another_are_refused(
    text: SampleConfig, models: Path
) -> None:
    with pytest.raises(ValueError, match=r"text_encoder\.path: expected the encoder that the pol"):
        draw_samples(replace(text, text_encoder=TextEncoderConfig()))
    narrow = replace(text, policy=str(models / "text_policy"))
    with pytest.raises(ValueError, match=r"text_encoder\.path: expected features of width 8, "):
        draw_samples(narrow)
    with pytest.raises(ValueError, match=r"expected one of .* got labels and prompts"):
        replace(text, labels=[1])


def test_names_are_those_of_the_library_and_case_does_not_matter() -> None:
    golden = IMAGENET_CLASSNAMES.index("Golden Retriever")
    assert labels_of([" golden retriever", "Otter"], "imagenet") == [
        golden,
        IMAGENET_CLASSNAMES.index("otter"),
    ]
    assert labels_of(["seven", "zero"], "digits") == [7, 0]


def test_an_unknown_name_is_answered_with_close_ones() -> None:
    with pytest.raises(ValueError, match=r"got 'golden retreiver'; close: golden retriever"):
        labels_of(["golden retreiver"], "imagenet")
    with pytest.raises(ValueError, match=r"got 'retriever'; close: .*golden retriever"):
        labels_of(["retriever"], "imagenet")
    with pytest.raises(ValueError, match=r"expected a class of digits, got 'xyzzy'$"):
        labels_of(["xyzzy"], "digits")


def test_a_name_of_two_classes_is_refused_with_both_labels() -> None:
    both = [i for i, name in enumerate(IMAGENET_CLASSNAMES) if name == "missile"]
    assert len(both) == 2
    with pytest.raises(ValueError, match=f"labels {both[0]}, {both[1]} share"):
        labels_of(["missile"], "imagenet")


@pytest.mark.parametrize("label", [-1, 10, 1000])
def test_a_label_that_the_policy_has_not_is_refused_before_anything_is_made(
    config: SampleConfig, label: int
) -> None:
    with pytest.raises(ValueError, match=rf"labels: expected 0 to 9, got {label}"):
        draw_samples(replace(config, labels=[3, label]))
    assert not Path(str(config.output_dir)).exists()


def test_one_way_of_saying_what_to_draw_is_asked_for(config: SampleConfig) -> None:
    with pytest.raises(ValueError, match=r"labels: expected one of .* got labels and names"):
        replace(config, names=["seven"])
    with pytest.raises(ValueError, match=r"labels: expected one of .* got none of them"):
        replace(config, labels=None)
    with pytest.raises(ValueError, match=r"^labels: expected at least one, got none"):
        replace(config, labels=[])
    with pytest.raises(ValueError, match=r"^names: expected at least one, got none"):
        replace(config, labels=None, names=[])


def test_a_model_that_is_not_there_is_named_by_its_setting(config: SampleConfig) -> None:
    for name in ("policy", "tokenizer"):
        with pytest.raises(FileNotFoundError, match=rf"^{name}: missing\.pt: expected"):
            draw_samples(replace(config, **{name: "missing.pt"}))
    with pytest.raises(ValueError, match=r"^image_size: expected 16"):
        draw_samples(replace(config, image_size=24))


def test_a_tokenizer_of_another_codebook_is_refused_before_anything_is_made(
    config: SampleConfig, tmp_path: Path
) -> None:
    other = replace(load_tokenizer(config.tokenizer).config, codebook_size=16)
    save_tokenizer(VQTokenizer(other), tmp_path / "other")
    with pytest.raises(ValueError, match=r"tokenizer.*: expected a codebook of 32.* got 16"):
        draw_samples(replace(config, tokenizer=str(tmp_path / "other")))
    assert not Path(str(config.output_dir)).exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("temperature", -1.0),
        ("guidance_scale", 0.5),
        ("max_slots", 0),
        ("decode_batch", 0),
        ("num_images_per_prompt", 0),
        ("num_images_per_prompt", 2**63),
        ("labels", [3, 2**63]),
    ],
)
def test_a_number_out_of_range_is_refused_before_anything_is_loaded(
    config: SampleConfig, field: str, value: float | list[int]
) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected"):
        replace(config, policy="missing.pt", **{field: value})


@pytest.mark.parametrize("last", range(1, 8))
def test_a_disk_that_fills_up_at_any_file_leaves_no_part_of_a_set(
    config: SampleConfig, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(str(config.output_dir))
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    written: list[Path] = []

    def full_disk(image: torch.Tensor, path: Path, **options: object) -> None:
        if len(written) + 1 == last:
            raise StorageError(f"{path}: expected room for a file")
        written.append(path)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"PNG")

    # Six images in waves of four and two, and a grid.
    monkeypatch.setattr(sampling, "save_image", full_disk)
    monkeypatch.setattr(sampling, "save_grid", full_disk)
    with pytest.raises(StorageError, match="expected room"):
        draw_samples(replace(config, max_slots=4))
    assert len(written) == last - 1
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_pictures_without_tokens_are_a_set_too(config: SampleConfig) -> None:
    folder = Path(str(config.output_dir))
    folder.mkdir()
    (folder / "00000_class_0001.png").write_bytes(b"PNG")
    with pytest.raises(ValueError, match="output_dir: expected a folder without samples"):
        draw_samples(config)


def test_a_grid_holds_no_more_images_than_can_be_seen(
    config: SampleConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = draw_samples(replace(config, labels=[7], num_images_per_prompt=3))
    monkeypatch.setattr(sampling, "_GRID_IMAGES", 3)
    few = replace(config, max_slots=2, output_dir=f"{config.output_dir}-few")
    capped = draw_samples(replace(few, labels=[7], num_images_per_prompt=5))
    assert len(list(capped.glob("0*.png"))) == 5
    sizes = [Image.open(folder / "grid.png").size for folder in (whole, capped)]
    assert sizes[0] == sizes[1]


def test_samples_of_another_call_are_not_mixed_with_new_ones(config: SampleConfig) -> None:
    folder = draw_samples(config)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="output_dir: expected a folder without samples"):
        draw_samples(replace(config, seed=6))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_without_a_folder_each_call_makes_its_own(
    config: SampleConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = [draw_samples(replace(config, output_dir=None)).name for _ in range(2)]
    assert made == ["samples", "samples-2"]
