"""LlamaGen's VQ tokenizer against golden numbers, its sizes from weights, and its borders."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from argrpo.models import vq
from argrpo.models.vq import KNOWN_EXTRAS, VQConfig, VQTokenizer
from argrpo.models.vq_shapes import infer_config

GOLDEN = Path(__file__).parents[1] / "golden" / "vq_tokenizer"

# The reference's own fp32 error is 2.6e-6; the rest is for another order of summation.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}

GRIDS = {"small": (4, 4), "large": (8, 8)}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    published = torch.load(GOLDEN / "vq.pt", weights_only=True)["model"]
    return {key: value.float() for key, value in published.items() if key not in KNOWN_EXTRAS}


@pytest.fixture(scope="module")
def tokenizer(weights: dict[str, Tensor]) -> VQTokenizer:
    model = VQTokenizer(infer_config(weights))
    model.load_state_dict(weights, strict=True)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture(params=(128, 32), ids=("contiguous", "channels_last"))
def each_layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden tokenizer has 32 channels: a bound of 32 gives it the layout of wider ones."""
    monkeypatch.setattr(vq, "_CHANNELS_LAST_FROM", request.param)


@pytest.mark.usefixtures("each_layout")
@pytest.mark.parametrize("name", GRIDS)
def test_decoded_images_match_the_reference(
    name: str, tokenizer: VQTokenizer, expected: dict[str, Tensor]
) -> None:
    token_ids = expected[f"{name}_token_ids"].reshape(-1, *GRIDS[name])
    pixels = tokenizer.decode_latents(tokenizer.codes(token_ids))
    torch.testing.assert_close(pixels, expected[f"{name}_image"], **TOLERANCE)


@pytest.mark.usefixtures("each_layout")
@pytest.mark.parametrize("name", GRIDS)
def test_latents_match_the_reference(
    name: str, tokenizer: VQTokenizer, expected: dict[str, Tensor]
) -> None:
    latents = tokenizer.encode_latents(expected[f"{name}_encoder_input"])
    torch.testing.assert_close(latents, expected[f"{name}_quant_input"], **TOLERANCE)


@pytest.mark.usefixtures("each_layout")
@pytest.mark.parametrize("name", GRIDS)
def test_encoded_token_ids_equal_the_reference(
    name: str, tokenizer: VQTokenizer, expected: dict[str, Tensor]
) -> None:
    images = expected[f"{name}_encoder_input"] * 0.5 + 0.5
    torch.testing.assert_close(
        tokenizer.encode(images), expected[f"{name}_encoded_ids"], atol=0, rtol=0
    )


def test_decode_maps_to_zero_to_one_and_clamps(
    tokenizer: VQTokenizer, expected: dict[str, Tensor]
) -> None:
    raw = expected["small_image"]
    assert (raw.abs() > 1).any(), "the golden pictures leave [-1, 1], so the clamp is tried"
    images = tokenizer.decode(expected["small_token_ids"])
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, (0.5 * raw + 0.5).clamp(0, 1), **TOLERANCE)


def test_the_normalised_codebook_is_what_decodes(
    weights: dict[str, Tensor], tokenizer: VQTokenizer, expected: dict[str, Tensor]
) -> None:
    longer = VQTokenizer(tokenizer.config)
    longer.load_state_dict(
        {**weights, "quantize.embedding.weight": 3.0 * weights["quantize.embedding.weight"]}
    )
    token_ids = expected["small_token_ids"]
    # A row and three times the row agree to rounding once both have length 1.
    torch.testing.assert_close(longer.decode(token_ids), tokenizer.decode(token_ids), **TOLERANCE)


@pytest.mark.usefixtures("each_layout")
def test_batches_do_not_change_the_images(tokenizer: VQTokenizer) -> None:
    token_ids = torch.randint(0, 512, (5, 16), generator=torch.Generator().manual_seed(0))
    whole = tokenizer.decode(token_ids, decode_batch=5)
    for decode_batch in (1, 2, 64):
        pieces = tokenizer.decode(token_ids, decode_batch=decode_batch)
        # Convolutions over another batch size may sum in another order.
        torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=0)
    # A random codebook makes near-ties; the images decoded from the codes hold no such promise.
    assert torch.equal(
        tokenizer.encode(whole, encode_batch=2), tokenizer.encode(whole, encode_batch=2)
    )


def test_decoding_holds_one_batch_of_activations(tokenizer: VQTokenizer) -> None:
    sizes: list[int] = []
    hook = tokenizer.decoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    tokenizer.decode(torch.zeros((7, 16), dtype=torch.int64), decode_batch=3)
    hook.remove()
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize(("channels", "strided"), [(128, True), (96, False)])
def test_only_wide_networks_run_in_channels_last_from_end_to_end(
    channels: int, strided: bool
) -> None:
    levels = {"encoder_multipliers": (1, 2), "decoder_multipliers": (1, 2), "num_res_blocks": 1}
    model = VQTokenizer(VQConfig(codebook_size=16, z_channels=32, channels=channels, **levels))
    kept: list[bool] = []
    for name, module in model.named_modules():
        # Attention works on rows of positions, whatever comes and goes.
        if isinstance(module, (nn.Conv2d, nn.GroupNorm)) and "proj_out" not in name:
            module.register_forward_hook(
                lambda *call: kept.extend(
                    x.is_contiguous(memory_format=torch.channels_last) for x in (*call[1], call[2])
                )
            )
    images = model.decode(torch.arange(32).reshape(2, 16) % 16)
    model.encode(images)
    assert kept and (all(kept) if strided else not any(kept))
    # What leaves is laid out as ever, and so is what a file would hold.
    assert images.is_contiguous()
    assert all(weight.is_contiguous() for weight in model.state_dict().values())


def test_a_grid_that_is_not_square_is_row_major(tokenizer: VQTokenizer) -> None:
    token_ids = torch.randint(0, 512, (2, 8), generator=torch.Generator().manual_seed(1))
    images = tokenizer.decode(token_ids, grid=(2, 4))
    assert images.shape == (2, 3, 4, 8)
    by_hand = tokenizer.decode_latents(tokenizer.codes(token_ids.reshape(2, 2, 4)))
    torch.testing.assert_close(images, (0.5 * by_hand + 0.5).clamp(0, 1), **TOLERANCE)
    assert tokenizer.encode(images).shape == (2, 8)


def test_no_images_give_no_images(tokenizer: VQTokenizer) -> None:
    assert tokenizer.decode(torch.empty((0, 16), dtype=torch.int64)).shape == (0, 3, 8, 8)
    assert tokenizer.encode(torch.empty((0, 3, 8, 8))).shape == (0, 16)


def test_bf16_weights_decode_to_fp32_near_the_fp32_images(tokenizer: VQTokenizer) -> None:
    half = VQTokenizer(tokenizer.config)
    half.load_state_dict(tokenizer.state_dict())
    token_ids = torch.arange(32).reshape(2, 16)
    images = half.bfloat16().decode(token_ids)
    assert images.dtype == torch.float32
    # About twenty roundings of 2**-8 in a row, on values of size 1.
    assert (images - tokenizer.decode(token_ids)).abs().mean() < 0.02


def test_config_is_read_off_the_weights(weights: dict[str, Tensor]) -> None:
    assert infer_config(weights) == VQConfig(
        codebook_size=512,
        codebook_dim=8,
        z_channels=32,
        channels=32,
        encoder_multipliers=(1, 1),
        decoder_multipliers=(2, 1),
        num_res_blocks=2,
    )


@pytest.mark.parametrize(
    ("multipliers", "num_tensors", "num_parameters"),
    [((1, 1, 2, 2, 4), 343, 71_883_403), ((1, 2, 2, 4), 299, 70_109_835)],
    ids=["VQ-16", "VQ-8"],
)
def test_published_sizes_are_built_and_inferred(
    multipliers: tuple[int, ...], num_tensors: int, num_parameters: int
) -> None:
    config = VQConfig(encoder_multipliers=multipliers, decoder_multipliers=multipliers)
    with torch.device("meta"):
        state_dict = VQTokenizer(config).state_dict()
    assert infer_config(state_dict) == config
    assert len(state_dict) == num_tensors  # the published files hold codebook_used besides
    assert sum(value.numel() for value in state_dict.values()) == num_parameters


def test_missing_weights_are_refused_by_key(weights: dict[str, Tensor]) -> None:
    for key in ("quantize.embedding.weight", "encoder.conv_in.weight", "quant_conv.weight"):
        rest = {name: value for name, value in weights.items() if name != key}
        with pytest.raises(ValueError, match=f"{key}: expected in a tokenizer's weights"):
            infer_config(rest)
    with pytest.raises(ValueError, match=r"encoder\.conv_blocks\.0\.res\.0\.conv1\.weight"):
        infer_config({k: v for k, v in weights.items() if ".conv_blocks." not in k})


def test_impossible_sizes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.encoder_multipliers: .*48 \* 1"):
        VQConfig(channels=48)
    with pytest.raises(ValueError, match=r"tokenizer\.decoder_multipliers: .*as many levels"):
        VQConfig(decoder_multipliers=(1, 1))
    with pytest.raises(ValueError, match=r"tokenizer\.codebook_size: expected at least 1, got 0"):
        VQConfig(codebook_size=0)


@pytest.mark.parametrize(
    ("token_ids", "grid", "message"),
    [
        (torch.full((1, 16), 512), None, r"token_ids: expected ids in \[0, 512\), got 512 to 512"),
        (torch.full((1, 16), -1), None, r"token_ids: expected ids in \[0, 512\), got -1 to -1"),
        (torch.zeros((1, 15), dtype=torch.int64), None, "token_ids: expected a square number"),
        (torch.zeros((1, 0), dtype=torch.int64), None, "token_ids: expected a square number"),
        (torch.zeros((1, 16), dtype=torch.int64), (3, 5), "grid: expected rows .* = 16 tokens"),
        (torch.zeros((1, 16), dtype=torch.int64), (-4, -4), "grid: expected rows"),
        (torch.zeros((1, 16), dtype=torch.int32), None, r"token_ids: expected \[N, T\] int64"),
        (torch.zeros(16, dtype=torch.int64), None, r"token_ids: expected \[N, T\] int64"),
    ],
)
def test_wrong_token_ids_are_refused_by_name(
    token_ids: Tensor, grid: tuple[int, int] | None, message: str, tokenizer: VQTokenizer
) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.decode(token_ids, grid=grid)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 7, 8), "images: expected a height and width that are multiples of 2"),
        (torch.zeros(1, 1, 8, 8), r"images: expected \[N, 3, H, W\] floating point"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"images: expected \[N, 3, H, W\] floating"),
        (torch.full((1, 3, 8, 8), -1.0), r"images: expected pixels in \[0, 1\], got -1 to -1"),
        (torch.full((1, 3, 8, 8), float("nan")), r"images: expected pixels in \[0, 1\], got nan"),
    ],
)
def test_wrong_images_are_refused_by_name(
    images: Tensor, message: str, tokenizer: VQTokenizer
) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(images)


def test_a_batch_of_no_images_is_refused_by_name(tokenizer: VQTokenizer) -> None:
    with pytest.raises(ValueError, match="decode_batch: expected at least 1 image, got 0"):
        tokenizer.decode(torch.zeros((1, 16), dtype=torch.int64), decode_batch=0)
    with pytest.raises(ValueError, match="encode_batch: expected at least 1 image, got 0"):
        tokenizer.encode(torch.zeros((1, 3, 8, 8)), encode_batch=0)
