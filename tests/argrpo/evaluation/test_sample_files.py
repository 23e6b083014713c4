"""ADM's npz file of images: what numpy reads of it, and how little of it is held."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from argrpo.evaluation.sample_files import count_images, has_images, read_samples, write_samples


def levels(count: int, size: int = 6) -> Tensor:
    return torch.randint(256, (count, size, size, 3), dtype=torch.uint8)


def test_numpy_reads_what_was_written_in_parts(tmp_path: Path) -> None:
    images, labels = levels(10), np.arange(10)
    write_samples(tmp_path / "s.npz", images.split(4), 10, {"arr_1": labels})
    with np.load(tmp_path / "s.npz") as file:
        assert np.array_equal(file["arr_0"], images.numpy())
        assert np.array_equal(file["arr_1"], labels)
    assert has_images(tmp_path / "s.npz") and count_images(tmp_path / "s.npz") == 10


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_what_numpy_wrote_is_read_in_parts(tmp_path: Path, write) -> None:
    images = levels(11)
    write(tmp_path / "s.npz", images.numpy())
    parts = list(read_samples(tmp_path / "s.npz", 4))
    assert [len(part) for part in parts] == [4, 4, 3]
    assert torch.equal(torch.cat(parts), images)


def test_a_part_is_on_the_disk_before_the_next_one_is_asked_for(tmp_path: Path) -> None:
    seen: list[int] = []

    def parts() -> Iterator[Tensor]:
        for _ in range(5):
            (draft,) = tmp_path.glob(".*")
            seen.append(draft.stat().st_size)
            yield levels(2, size=256)

    write_samples(tmp_path / "s.npz", parts(), 10, {})
    part_bytes = 2 * 256 * 256 * 3
    # less what a buffered file may keep
    assert all(size >= place * part_bytes - 2**17 for place, size in enumerate(seen))


def test_a_part_is_read_without_those_behind_it(tmp_path: Path) -> None:
    write_samples(tmp_path / "s.npz", [levels(4, size=64)], 4, {})
    whole = (tmp_path / "s.npz").read_bytes()
    parts = read_samples(tmp_path / "s.npz", 1)
    next(parts)
    # The rest is broken now, which only whoever reads on can notice.
    broken = bytearray(whole)
    broken[len(whole) // 2 : len(whole) // 2 + 100] = bytes(100)
    (tmp_path / "s.npz").write_bytes(bytes(broken))
    with pytest.raises(ValueError, match=r"arr_0: expected images, .* in .*s\.npz"):
        list(parts)


def test_the_same_images_make_the_same_bytes(tmp_path: Path) -> None:
    images = levels(6)
    write_samples(tmp_path / "a.npz", images.split(5), 6, {"arr_1": np.arange(6)})
    write_samples(tmp_path / "b.npz", images.split(2), 6, {"arr_1": np.arange(6)})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_other_arrays_are_refused_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"expected uint8 \[N, H, W, 3\], got float64 \[2, 4, 4"):
        count_images(tmp_path / "floats.npz")
    with pytest.raises(ValueError, match=r"arr_0: expected images, .* in .*other\.npz"):
        list(read_samples(tmp_path / "other.npz", 2))
    assert not has_images(tmp_path / "other.npz")
    assert not has_images(tmp_path)
