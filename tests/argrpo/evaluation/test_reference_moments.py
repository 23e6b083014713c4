"""Moments of references: from a folder, a file or the embedded digits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from argrpo.digits.dataset import load_split
from argrpo.evaluation.moment_files import save_moments
from argrpo.evaluation.moments import moments_of
from argrpo.evaluation.reference_moments import reference_moments


class ChannelMeans:
    """An extractor that needs no weights."""

    name = "channel_means-1"
    dim = 3

    def __call__(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.float32
        return images.mean(dim=(2, 3))


def _save(levels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures of 6 x 6 in two folders, one of them grey, and a sheet of them."""
    rng = np.random.default_rng(0)
    for row in range(4):
        picture = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        _save(picture, tmp_path / "images" / str(row % 2) / f"{row}.png")
    _save(rng.integers(0, 256, (6, 6), dtype=np.uint8), tmp_path / "images" / "grey.PNG")
    _save(np.zeros((40, 30, 3), np.uint8), tmp_path / "images" / "grid.png")
    (tmp_path / "images" / "tokens.npy").write_bytes(b"no picture")
    return tmp_path / "images"


def _pixels(folder: Path) -> Tensor:
    paths = [*sorted((folder / "0").iterdir()), *sorted((folder / "1").iterdir())]
    pictures = [np.asarray(Image.open(p).convert("RGB")) for p in [*paths, folder / "grey.PNG"]]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255.0


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_a_folder_goes_through_the_extractor_whole(folder: Path, batch: int) -> None:
    found = reference_moments(str(folder), ChannelMeans(), batch=batch)
    wanted = moments_of(ChannelMeans()(_pixels(folder)))
    assert found.num_images == 5
    assert found.features == "channel_means-1"
    # fp32 means of 36 pixels, summed in another order
    torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.cov, wanted.cov, rtol=1e-5, atol=1e-7)


def test_pictures_of_other_sizes_are_refused_or_brought_to_one(folder: Path) -> None:
    _save(np.full((9, 12, 3), 255, np.uint8), folder / "wide.png")
    with pytest.raises(ValueError, match=r"expected squares of one size .* got \[9, 12\] in wide"):
        reference_moments(str(folder), ChannelMeans())
    found = reference_moments(str(folder), ChannelMeans(), image_size=6)
    assert found.num_images == 6
    white = ChannelMeans()(torch.cat([_pixels(folder), torch.ones(1, 3, 6, 6)]))
    # the crop of a white picture is white, and resizing 6 x 6 to itself changes nothing
    torch.testing.assert_close(found.mean, moments_of(white).mean, rtol=1e-6, atol=1e-7)


def test_only_the_middle_square_counts_when_pictures_are_cropped(tmp_path: Path) -> None:
    levels = np.zeros((8, 16, 3), np.uint8)
    levels[:, 4:12] = 255
    for name in ("a.png", "b.png"):
        _save(levels, tmp_path / name)
    found = reference_moments(str(tmp_path), ChannelMeans(), image_size=4)
    torch.testing.assert_close(found.mean, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_picture_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "damaged.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(ValueError, match=r"expected an image, got .*damaged\.png"):
        reference_moments(str(folder), ChannelMeans())


def test_an_empty_folder_and_nothing_at_all_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected images .* got none in"):
        reference_moments(str(tmp_path), ChannelMeans())
    with pytest.raises(FileNotFoundError, match="expected an npz file or a folder of images"):
        reference_moments(str(tmp_path / "missing"), ChannelMeans())


def test_a_file_is_taken_if_the_same_network_made_it(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    moments = moments_of(torch.rand(9, 3), ChannelMeans.name)
    save_moments(moments, path)
    assert torch.equal(reference_moments(str(path), ChannelMeans()).mean, moments.mean)
    save_moments(moments_of(torch.rand(9, 3), "channel_means-2"), path)
    with pytest.raises(ValueError, match=r"expected .* by channel_means-1, got those of channel_m"):
        reference_moments(str(path), ChannelMeans())


def test_a_file_of_another_dimension_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match=r"expected moments of 3 features .* got 2048 in .*m\.npz"):
        reference_moments(str(tmp_path / "m.npz"), ChannelMeans())


def test_the_embedded_digits_are_a_dataset() -> None:
    found = reference_moments("dataset:digits/policy", ChannelMeans())
    wanted = moments_of(ChannelMeans()(load_split("policy").images))
    torch.testing.assert_close(found.cov, wanted.cov, rtol=1e-9, atol=1e-12)
    assert found.num_images == 700
    with pytest.raises(ValueError, match=r"split: expected one of policy, .* got 'polcy'"):
        reference_moments("dataset:digits/polcy", ChannelMeans())
    with pytest.raises(ValueError, match="expected dataset:digits/SPLIT, got dataset:imagenet"):
        reference_moments("dataset:imagenet", ChannelMeans())
