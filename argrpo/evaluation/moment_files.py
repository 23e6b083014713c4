"""Moments in npz files: ours, and those that others publish.

    ours       mean [C], std [C], cov [C, C] if known, features (a name), num_images
    ADM        mu [C], sigma [C, C]; openai/guided-diffusion's and most FID references; theirs
               also hold mu_s, sigma_s, those of sFID, which tell that the network was Inception
    diagonal   mu or mean [C] with sigma_diagonal [C] (variances) or std [C]; bugrabaran/
               ar-policy-tuning writes the first

Most files of others do not say what made their features, and two networks may well have the same
number of them: only the dimension can be checked.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from argrpo.evaluation.moments import Moments
from argrpo.run_folder import write_atomically

_ADM_NETWORK = "inception_fid"
_LAYOUTS = "mean + std (and cov), mu + sigma, or mu + sigma_diagonal"


def save_moments(moments: Moments, path: Path) -> None:
    """Write moments as an npz file, whole or not at all.

    Raises:
        ValueError: the name does not end in .npz.
        StorageError: the disk is full or refused.
    """
    if path.suffix != ".npz":
        raise ValueError(f"output: expected a name that ends in .npz, got {path}")
    record = {"mean": moments.mean.cpu().numpy(), "std": moments.std.cpu().numpy()}
    if moments.cov is not None:
        record["cov"] = moments.cov.cpu().numpy()
    if moments.features is not None:
        record["features"] = np.array(moments.features)
    if moments.num_images is not None:
        record["num_images"] = np.array(moments.num_images)
    write_atomically(path, lambda part: np.savez(part, **record))  # type: ignore[arg-type]


def has_moments(path: str | Path) -> bool:
    """Whether a path is an npz file that states a mean."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return bool({"mean.npy", "mu.npy"} & set(archive.namelist()))


def load_moments(path: str | Path, *, spatial: bool = False) -> Moments:
    """Moments from any of the layouts above.

    Args:
        path: the file.
        spatial: those of sFID (mu_s, sigma_s) instead.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no npz, has none of the layouts, or holds no moments.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"moments: expected an npz file, got {path}")
    try:
        # Pickled entries stay unread: nothing here needs one, and reading one runs code.
        file = np.load(path, allow_pickle=False)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        raise ValueError(f"moments: expected an npz file, got {path}: {error}") from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError(f"moments: expected an npz file with named arrays, got {path}")
    with file:
        return _spatial_moments(path, file) if spatial else _moments(path, file)


def has_spatial_moments(path: str | Path) -> bool:
    """Whether a path is an npz file with moments of sFID."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"mu_s.npy", "sigma_s.npy"} <= set(archive.namelist())


def _spatial_moments(path: str | Path, file: np.lib.npyio.NpzFile) -> Moments:
    mean = _entry(path, file, "mu_s", None)
    cov = _entry(path, file, "sigma_s", (len(mean), len(mean)))
    return Moments(mean, cov.diagonal().clamp_min(0.0).sqrt(), (cov + cov.T) / 2, _ADM_NETWORK)


def _moments(path: str | Path, file: np.lib.npyio.NpzFile) -> Moments:
    names = set(file.files)
    mean_name = next((name for name in ("mean", "mu") if name in names), None)
    cov_name = next((name for name in ("cov", "sigma") if name in names), None)
    has_spread = bool(names & {"cov", "sigma", "std", "sigma_diagonal"})
    if mean_name is None or not has_spread:
        raise ValueError(
            f"moments: expected {_LAYOUTS} in {path}, got {', '.join(sorted(names)) or 'nothing'}"
        )
    mean = _entry(path, file, mean_name, None)
    dim = len(mean)
    cov = None if cov_name is None else _entry(path, file, cov_name, (dim, dim))
    if "std" in names:
        variance = _entry(path, file, "std", (dim,)).square()
    elif "sigma_diagonal" in names:
        variance = _entry(path, file, "sigma_diagonal", (dim,))
    else:
        assert cov is not None
        variance = cov.diagonal()
    if cov is not None:
        cov = (cov + cov.T) / 2
    return Moments(
        mean,
        variance.clamp_min(0.0).sqrt(),
        cov,
        features=_network(file),
        num_images=int(file["num_images"]) if "num_images" in names else None,
    )


def _network(file: np.lib.npyio.NpzFile) -> str | None:
    if "features" in file.files:
        return str(file["features"])
    return _ADM_NETWORK if "mu_s" in file.files else None


def _entry(
    path: str | Path, file: np.lib.npyio.NpzFile, name: str, shape: tuple[int, ...] | None
) -> Tensor:
    """One array, fp64 and finite; `shape` None wants a vector of any length."""
    try:
        values = file[name]
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(f"moments.{name}: expected numbers in {path}, got {error}") from error
    if shape is None and values.ndim == 1 and len(values) > 0:
        shape = values.shape
    if values.shape != shape:
        wanted = "[C]" if shape is None else list(shape)
        raise ValueError(f"moments.{name}: expected {wanted} in {path}, got {list(values.shape)}")
    if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise ValueError(f"moments.{name}: expected finite numbers in {path}, got others")
    return torch.from_numpy(np.asarray(values, dtype=np.float64))
