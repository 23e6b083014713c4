"""`argrpo.ImagePipeline`: pictures of classes and texts, the same whatever is drawn beside them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import argrpo
from argrpo.cli import main
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.exit_codes import DONE
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import save_policy, save_tokenizer
from argrpo.models.vq import VQConfig, VQTokenizer
from argrpo.pipeline import ImagePipeline
from argrpo.pixels import to_uint8

GOLDEN = Path(__file__).parents[1] / "golden"
NET2NET = GOLDEN / "taming_net2net"
SIZES = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "vocab_size": 64}
GRID = {"image_size": 8, "downsample": 2, "num_classes": 10}


def lively(policy: LlamaGen) -> LlamaGen:
    """Random weights whose logits differ by a few units."""
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
    return policy.requires_grad_(False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a class policy, a text policy and a tokenizer for both."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("models")
    save_policy(lively(LlamaGen(LlamaGenConfig(**SIZES, **GRID))), folder / "classes")
    text = {"model_type": "t2i", "prefix_len": 6, "caption_dim": 64}
    save_policy(lively(LlamaGen(LlamaGenConfig(**SIZES, **GRID, **text))), folder / "texts")
    one = (1, 1)
    codes = VQConfig(
        codebook_size=64,
        z_channels=32,
        channels=32,
        encoder_multipliers=one,
        decoder_multipliers=one,
        num_res_blocks=1,
    )
    save_tokenizer(VQTokenizer(codes), folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def pipe(models: Path) -> ImagePipeline:
    tokenizer = models / "tokenizer"
    return ImagePipeline.from_pretrained(models / "classes", tokenizer=tokenizer, max_slots=4)


def test_an_image_of_a_list_of_seeds_is_the_same_whatever_is_drawn_beside_it(
    pipe: ImagePipeline,
) -> None:
    labels, seeds = [3, 1, 4, 1, 5, 9, 2], [7, 11, 7, 2**62, -5, 0, 3]
    whole = pipe(class_labels=labels, seed=seeds, output_type="pt").images
    tokens = pipe(class_labels=labels, seed=seeds, output_type="latent").images
    for row in (0, 2, 3, 6):
        asked = {"class_labels": labels[row], "seed": [seeds[row]]}
        # Bit for bit: every picture is computed in a full batch and decoded alone.
        assert torch.equal(pipe(**asked, output_type="latent").images, tokens[row : row + 1])
        assert torch.equal(pipe(**asked, output_type="pt").images, whole[row : row + 1])
    assert not torch.equal(tokens[1], tokens[3]), "another seed is another picture"


def test_generators_stand_for_seeds_and_move_on_as_in_diffusers(pipe: ImagePipeline) -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    def drawn(generator: object) -> torch.Tensor:
        return pipe(class_labels=[2, 2], generator=generator, output_type="latent").images

    listed = drawn(generators())
    assert torch.equal(listed, drawn(generators()))
    swapped = drawn(generators()[::-1])
    assert torch.equal(listed, swapped.flip(0))
    one = torch.Generator().manual_seed(5)
    first, second = drawn(one), drawn(one)
    assert not torch.equal(first, second)
    assert torch.equal(first, drawn(torch.Generator().manual_seed(5)))
    # Without either, PyTorch's own generator decides.
    torch.manual_seed(9)
    free = drawn(None)
    torch.manual_seed(9)
    assert torch.equal(free, drawn(None))


def test_a_single_seed_draws_what_the_engine_draws(pipe: ImagePipeline) -> None:
    params = SamplingParams(guidance_scale=2.0, temperature=0.8, top_k=20, top_p=0.9)
    asked = {"guidance_scale": 2.0, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    images = pipe(
        class_labels=[1, 2], num_images_per_prompt=2, seed=4, output_type="latent", **asked
    )
    labels = torch.tensor([1, 1, 2, 2])
    rollout = RolloutEngine(pipe.policy, max_slots=4).draw(labels, params, seed=4)
    assert torch.equal(images.images, rollout.token_ids)


def test_every_output_type_shows_the_same_pictures(pipe: ImagePipeline) -> None:
    asked = {"class_labels": torch.tensor([1, 2]), "seed": 0}
    pixels = pipe(**asked, output_type="pt").images
    assert pixels.shape == (2, 3, 8, 8)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    rows = pipe(**asked, output_type="np").images
    assert np.array_equal(rows, pixels.permute(0, 2, 3, 1).numpy())
    pictures = pipe(**asked).images
    assert all(isinstance(picture, Image.Image) for picture in pictures)
    expected = to_uint8(pixels).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), expected)
    (alone,) = pipe(**asked, output_type="pt", return_dict=False)
    assert torch.equal(alone, pixels)
    tokens = pipe(**asked, output_type="latent").images
    assert torch.equal(pipe.tokenizer.decode(tokens, decode_batch=1), pixels)


def test_texts_are_drawn_by_the_encoder_that_is_named(
    models: Path, tiny_t5: Path, tmp_path: Path
) -> None:
    pipe = argrpo.ImagePipeline.from_pretrained(
        models / "texts",
        tokenizer=models / "tokenizer",
        text_encoder=str(tiny_t5),
        cache_dir=str(tmp_path),
        max_slots=4,
    )
    prompts = ["a seven", "a small, tilted zero"]
    both = pipe(prompt=prompts, num_images_per_prompt=2, seed=[1, 2, 1, 2], output_type="latent")
    assert len(both.images) == 4
    one = pipe(prompt="a small, tilted zero", seed=[2], output_type="latent").images
    assert torch.equal(one, both.images[3:])
    assert not torch.equal(both.images[1], both.images[3]), "the text decides"
    with pytest.raises(ValueError, match="prompt: expected by this policy and nothing beside it"):
        pipe(class_labels=[1])
    with pytest.raises(ValueError, match="prompt: expected a text or a list of texts, got "):
        pipe(prompt=[])
    with pytest.raises(ValueError, match="prompt: expected texts, got 7 among them"):
        pipe(prompt=["a seven", 7])
    with pytest.raises(ValueError, match="dtype: expected float32 or bfloat16, got 'float16'"):
        ImagePipeline.from_pretrained(
            models / "texts", tokenizer=models / "tokenizer", dtype="float16"
        )
    with pytest.raises(ValueError, match="device: expected auto, cpu or cuda, got 'tpu'"):
        ImagePipeline.from_pretrained(
            models / "texts", tokenizer=models / "tokenizer", device="tpu"
        )
    pipe = ImagePipeline.from_pretrained(models / "texts", tokenizer=models / "tokenizer")
    with pytest.raises(ValueError, match=r"text_encoder\.path: expected the encoder"):
        pipe(prompt="a seven")


def test_what_taming_wrote_is_one_folder_drawn_by_its_published_filters(tmp_path: Path) -> None:
    folder = tmp_path / "taming"
    sources = (NET2NET / "last.ckpt", NET2NET / "project.yaml", folder)
    assert main(["convert", "taming", *map(str, sources)]) == DONE
    pipe = ImagePipeline.from_pretrained(folder, max_slots=2)
    tokens = pipe(class_labels=[3, 5], seed=1, output_type="latent").images
    published = SamplingParams(top_k=600, top_p=0.92)
    engine = RolloutEngine(pipe.policy, max_slots=2)
    expected = engine.draw(torch.tensor([3, 5]), published, seed=1).token_ids
    assert torch.equal(tokens, expected)
    with pytest.raises(ValueError, match="guidance_scale: expected 1, because this policy was"):
        pipe(class_labels=[1], guidance_scale=2.0)


def test_an_argrpo_folder_holds_all_that_is_needed() -> None:
    folder = GOLDEN / "argrpo_hf_checkpoint" / "plain"
    # Its policy knows 64 of the tokenizer's 512 codes: the toy files are of two models.
    with pytest.raises(ValueError, match=r"tokenizer\.path: expected a codebook of 64"):
        ImagePipeline.from_pretrained(folder, num_heads=2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "class_labels: expected by this policy and nothing beside it, got nothing"),
        ({"prompt": "a seven"}, "class_labels: expected by this policy .* got prompt"),
        ({"class_labels": [10]}, "labels: expected 0 to 9, got 10"),
        ({"class_labels": [1], "num_images_per_prompt": 0}, "num_images_per_prompt: expected"),
        (
            {"class_labels": [1], "output_type": "jpeg"},
            "output_type: expected pil, np, pt or latent",
        ),
        ({"class_labels": [1], "seed": [1, 2]}, "seed: expected one, or one for each of 1 images"),
        ({"class_labels": [1], "seed": [2**63]}, "seed: expected signed 64-bit integers"),
        ({"class_labels": [1], "top_p": 0.0}, "top_p: expected"),
        ({"class_labels": [1.5]}, r"class_labels: expected one or more whole numbers, got \[1.5\]"),
        ({"class_labels": ["seven"]}, r"class_labels: expected .* get_label_ids finds those of"),
        (
            {"class_labels": [1], "num_images_per_prompt": 1.5},
            "num_images_per_prompt: expected a wh",
        ),
        ({"class_labels": [1], "top_k": 1.5}, "top_k: expected an integer of at least 0, got 1.5"),
        ({"class_labels": []}, r"class_labels: expected one or more whole numbers, got \[\]"),
        ({"class_labels": [1], "seed": 1, "generator": torch.Generator()}, "generator: expected"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(
    asked: dict[str, object], message: str, pipe: ImagePipeline
) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**asked)


def test_parts_that_are_missing_are_named(models: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer: expected a path, because .* holds"):
        ImagePipeline.from_pretrained(models / "classes")
    with pytest.raises(ValueError, match="text_encoder: expected None for a policy of classes"):
        ImagePipeline.from_pretrained(
            models / "classes", tokenizer=models / "tokenizer", text_encoder="t5"
        )
    with pytest.raises(FileNotFoundError, match="nowhere: expected a path, or a repository"):
        ImagePipeline.from_pretrained(models / "nowhere", tokenizer=models / "tokenizer")


def test_labels_of_names_are_found(pipe: ImagePipeline) -> None:
    assert pipe.get_label_ids("golden retriever") == [207]
    assert pipe.get_label_ids(["Otter", "golden retriever"]) == [360, 207]
