"""PNG files hold the bytes that the pixel rule says, and a grid puts images where they belong."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from argrpo.image_files import grid, read_image, save_grid, save_image
from argrpo.pixels import to_uint8
from argrpo.run_folder import StorageError


def test_a_png_file_holds_exactly_the_bytes_of_the_pixel_rule(tmp_path: Path) -> None:
    image = torch.rand(3, 17, 23)
    for rule in ("llamagen", "truncate", "round"):
        save_image(image, tmp_path / f"{rule}.png", pixels=rule)
        read = np.asarray(Image.open(tmp_path / f"{rule}.png"))
        assert np.array_equal(read, to_uint8(image, rule).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_a_picture_of_any_kind_is_read_as_red_green_and_blue(tmp_path: Path, mode: str) -> None:
    levels = torch.randint(256, (17, 23, 3), dtype=torch.uint8).numpy()
    picture = Image.fromarray(levels).convert(mode)
    picture.save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    (path,) = tmp_path.iterdir()
    with Image.open(path) as file:
        wanted = np.asarray(file.convert("RGB")) / np.float32(255)
    assert np.array_equal(read_image(path).permute(1, 2, 0).numpy(), wanted)


def test_grey_of_16_bits_is_no_white(tmp_path: Path) -> None:
    levels = np.arange(0, 65536, 128, dtype=np.uint16).reshape(16, 32)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    image = read_image(tmp_path / "deep.png")
    assert image.shape == (3, 16, 32) and image.dtype == torch.float32
    assert np.array_equal(image[1].numpy(), levels / np.float32(65535))


def test_a_grid_places_images_row_by_row_with_a_gap_between_them() -> None:
    levels = torch.tensor([0.0, 0.2, 0.4, 0.6, 1.0])
    images = levels[:, None, None, None].expand(5, 3, 70, 70)
    sheet = grid(images, columns=3)
    assert sheet.shape == (3, 2 * 72 - 2, 3 * 72 - 2)
    corners = [(0, 0), (0, 72), (0, 144), (72, 0), (72, 72)]
    for image, (top, left) in zip(to_uint8(images), corners, strict=True):
        assert torch.equal(sheet[:, top : top + 70, left : left + 70], image)
    background = sheet[:, :70, 70:72]
    assert background.unique().numel() == 1
    assert torch.equal(sheet[:, 72:, 144:].unique(), background.unique())


def test_small_images_are_enlarged_by_whole_factors_so_that_no_pixel_changes() -> None:
    images = torch.rand(4, 3, 32, 32)
    sheet = grid(images, columns=2)
    assert sheet.shape == (3, 132, 132)
    assert torch.equal(sheet[:, 0:64:2, 0:64:2], to_uint8(images[0]))
    assert torch.equal(sheet[:, 1:64:2, 1:64:2], to_uint8(images[0]))


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (4, 4), (20, 10), (40, 10), (7, 3), (16, 8)]
)
def test_columns_fill_the_rows_where_they_can(count: int, columns: int) -> None:
    width = grid(torch.zeros(count, 3, 64, 64)).shape[2]
    assert (width + 2) // 66 == columns


def test_other_shapes_are_refused_by_name(tmp_path: Path) -> None:
    for images in (torch.rand(0, 3, 8, 8), torch.rand(2, 1, 8, 8), torch.rand(3, 8, 8)):
        with pytest.raises(ValueError, match=r"images: expected \[N, 3, H, W\]"):
            save_grid(images, tmp_path / "grid.png")
    with pytest.raises(ValueError, match=r"image: expected \[3, H, W\]"):
        save_image(torch.rand(1, 8, 8), tmp_path / "image.png")
    with pytest.raises(ValueError, match="columns: expected at least 1"):
        save_grid(torch.rand(2, 3, 8, 8), tmp_path / "grid.png", columns=0)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_during_a_grid_leaves_nothing(
    tmp_path: Path, files_up_to: Callable[[int], AbstractContextManager[None]]
) -> None:
    images = torch.rand(4, 3, 64, 64)  # noise: a PNG file of more than 40 kB
    with files_up_to(8192), pytest.raises(StorageError, match=r"grid\.png: expected room"):
        save_grid(images, tmp_path / "grid.png")
    assert list(tmp_path.iterdir()) == []
