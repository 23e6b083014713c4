"""npz files of moments: ours and those of others."""

from pathlib import Path

import numpy as np
import pytest
import torch

from argrpo.evaluation.moment_files import load_moments, save_moments
from argrpo.evaluation.moments import Moments, moments_of


@pytest.fixture
def moments() -> Moments:
    return moments_of(torch.randn(20, 6, dtype=torch.float64), "inception-0123")


def test_our_own_file_comes_back_whole(moments: Moments, tmp_path: Path) -> None:
    save_moments(moments, tmp_path / "m.npz")
    found = load_moments(tmp_path / "m.npz")
    assert torch.equal(found.mean, moments.mean)
    assert torch.equal(found.cov, moments.cov)
    # a square root and its square
    torch.testing.assert_close(found.std, moments.std, rtol=1e-15, atol=0)
    assert (found.features, found.num_images) == ("inception-0123", 20)


def test_a_file_of_the_adm_layout_is_read(moments: Moments, tmp_path: Path) -> None:
    extra = {"mu_s": np.zeros(3), "sigma_s": np.eye(3), "arr_0": np.zeros((2, 2), np.uint8)}
    np.savez(tmp_path / "adm.npz", mu=moments.mean, sigma=moments.cov, **extra)
    found = load_moments(tmp_path / "adm.npz")
    assert torch.equal(found.cov, moments.cov)
    torch.testing.assert_close(found.std, moments.std)
    assert found.features == "inception_fid", "only that network has spatial moments"
    spatial = load_moments(tmp_path / "adm.npz", spatial=True)
    assert torch.equal(spatial.cov, torch.eye(3, dtype=torch.float64))


def test_the_released_layout_of_variances_is_read_and_its_pickle_is_left_alone(
    moments: Moments, tmp_path: Path
) -> None:
    np.savez(
        tmp_path / "released.npz",
        mu=moments.mean.numpy(),
        sigma_diagonal=moments.std.square().numpy(),
        meta={"resize": 299},
    )
    found = load_moments(tmp_path / "released.npz")
    torch.testing.assert_close(found.std, moments.std)
    assert found.cov is None


def test_means_and_deviations_alone_are_read(moments: Moments, tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", mean=moments.mean.float(), std=moments.std.float())
    found = load_moments(tmp_path / "m.npz")
    assert found.mean.dtype == torch.float64
    torch.testing.assert_close(found.std, moments.std.float().double())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, r"moments: expected mean \+ std .* got a"),
        ({"mu": np.zeros(3)}, r"moments: expected mean \+ std .* got mu"),
        ({"mu": np.zeros((3, 1)), "sigma": np.eye(3)}, r"moments\.mu: expected \[C\] in"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"moments\.sigma: expected \[3, 3\] in .*, got"),
        ({"mu": np.array([1, np.nan]), "sigma": np.eye(2)}, r"moments\.mu: expected finite"),
        ({"mu": np.zeros(2), "sigma": np.array({"a": 1})}, r"moments\.sigma: expected numbers"),
    ],
)
def test_a_file_without_moments_is_refused_by_what_is_wrong(
    tmp_path: Path, arrays: dict, message: str
) -> None:
    np.savez(tmp_path / "m.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_moments(tmp_path / "m.npz")


def test_what_is_no_npz_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("mean and std")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    for name in ("text.npz", "array.npy", "cut.npz"):
        with pytest.raises(ValueError, match="moments: expected an npz file"):
            load_moments(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="moments: expected an npz file, got"):
        load_moments(tmp_path / "missing.npz")


def test_another_suffix_is_refused(moments: Moments, tmp_path: Path) -> None:
    # numpy would add .npz itself, and the file asked for would not be there
    with pytest.raises(ValueError, match=r"output: expected a name that ends in \.npz, got"):
        save_moments(moments, tmp_path / "moments.pt")
