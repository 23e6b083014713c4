"""Exact Frechet distances with each image of a batch left out, for one eigendecomposition.

    F_i = |mu_r - mu_i|^2 + tr S_r + tr S_i - 2 tr (S_r^1/2 S_i S_r^1/2)^1/2

with mean mu_i and covariance S_i of all images but i. Leaving one out changes the covariance by
rank one: S_i = a S - b g_i g_i^T, g_i the image's deviation from the mean. With the eigenvalues
lambda and vectors Q of A = S_r^1/2 S S_r^1/2, y_i = Q^T S_r^1/2 g_i and m_j = a lambda_j,

    tr A_i^1/2 = sum_j m_j^1/2 + 1/(2 pi) int_0^inf t^-1/2 log d_i(t) dt
    d_i(t)     = 1 - sum_j s_ij m_j / (m_j + t)        s_ij = b y_ij^2 / m_j
               = (1 - sum_j s_ij) + sum_j s_ij t / (m_j + t)

by log det (I + A/t). The second form of d_i is a sum of non-negative terms: where an image takes a
dimension away with it, 1 - sum_j s_ij is 0 and nothing cancels. The integral is done in log t,
where the trapezoid rule converges exponentially (the nearest singularity is pi away), after taking
off one term of the same shape, log (k - p + t) / (k + t), that agrees to second order at large t
and whose integral 2 pi ((k - p)^1/2 - k^1/2) is known.

Cost: O(C^3) once, N images for O(N C^2) after that. With no more images than features, everything
happens in the [N - 1, N - 1] Gram matrix of the centred images, in O(N C^2 + N^3). Measured on one
CPU core, 144 images at C = 2048, against 1.6 s for one eigendecomposition of that size: a batch
alone 0.04 s, inside carried moments 3.1 s (1/73 of an eigendecomposition an image).

Shapes: N images, C features, R directions in which the images differ. All in fp64.

Source: the definition as in frechet.py; the rest by linear algebra (matrix determinant lemma).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.evaluation.moments import Moments, RawMoments

# Of log t, relative to the largest eigenvalue: outside, the integrand is below 2e-14 of the root of
# that eigenvalue; the trapezoid rule at this step errs by exp(-2 pi^2 / step) = 5e-15.
_LOWEST, _HIGHEST, _STEP = -72.0, 13.0, 0.6
# An eigenvalue below this share of the largest one, times the size of the matrix, is rounding.
_EPSILON = 4 * torch.finfo(torch.float64).eps


class LeaveOneOut(NamedTuple):
    """Frechet distances of a batch."""

    distance: Tensor  # [] fp64, of all images
    without: Tensor  # [N] fp64, with one image left out each


@dataclass(frozen=True, slots=True, eq=False)
class FrechetReference:
    """The distribution that distances are taken to, with what they need of it."""

    mean: Tensor  # [C] fp64
    cov: Tensor  # [C, C] fp64
    root: Tensor  # [C, C] fp64, symmetric square root of `cov`

    @classmethod
    def of(cls, moments: Moments) -> "FrechetReference":
        """Raises ValueError if the moments hold no covariances between features."""
        if moments.cov is None:
            raise ValueError(
                "cov: expected a full covariance, got the variance of each feature alone; "
                "make the file again with argrpo moments, or take form: diagonal"
            )
        return cls(moments.mean, moments.cov, symmetric_root(moments.cov))


def symmetric_root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a covariance [C, C]; what rounding put below 0 counts as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0.0).sqrt() @ vectors.T


def batch_leave_one_out(
    features: Tensor, reference: FrechetReference, *, correction: int = 1
) -> LeaveOneOut:
    """Distances of the batch alone.

    Args:
        features: [N, C] finite, N at least 2 + correction.
        reference: of C features.
        correction: covariances divide by the number of images less this: 1 or 0.

    Raises:
        ValueError: too few images.
    """
    num_images, dim = features.shape
    if num_images < 2 + correction:
        raise ValueError(f"features: expected at least {2 + correction} images, got {num_images}")
    mean = features.double().mean(dim=0)
    deviations = features.double() - mean
    spectrum = _gram_spectrum if num_images <= dim else _covariance_spectrum
    values, shares, at_zero = spectrum(deviations, reference, num_images - correction)
    trace = deviations.square().sum() / (num_images - correction)
    grow = (num_images - correction) / (num_images - 1 - correction)
    shrink = num_images / ((num_images - 1) * (num_images - 1 - correction))
    roots = _root_traces(grow * values, shares, at_zero)
    squares = deviations.square().sum(dim=1)
    base = reference.cov.trace()
    without = (
        (reference.mean - mean + deviations / (num_images - 1)).square().sum(dim=1)
        + (base + grow * trace - shrink * squares)
        - 2.0 * roots
    )
    distance = (reference.mean - mean).square().sum() + base + trace - 2.0 * values.sqrt().sum()
    return LeaveOneOut(distance, without)


def carried_leave_one_out(
    features: Tensor, state: RawMoments, reference: FrechetReference, *, decay: float
) -> LeaveOneOut:
    """Distances of a batch mixed into carried moments: decay * state + (1 - decay) * batch.

    Leaving an image out, the others share the batch's part.

    Args:
        features: [N, C] finite, N at least 2.
        state: its `second` is [C, C]; taken at full weight, whatever weight it has, above 0.
        reference: of C features.
        decay: what the state counts, in [0, 1).

    Raises:
        ValueError: too few images.
    """
    if len(features) < 2:
        raise ValueError(f"features: expected at least 2 images, got {len(features)}")
    heavy = _HeavyMixture.of(features.double(), state, decay)
    each, deviations = heavy.each, heavy.deviations
    values, vectors = torch.linalg.eigh(reference.root @ heavy.cov @ reference.root)
    seen = deviations @ reference.root @ vectors
    kept, shares, at_zero = _split(values, each * seen.square())
    roots = _root_traces(heavy.total * kept, shares, at_zero)
    squares = deviations.square().sum(dim=1)
    trace = heavy.total * heavy.cov.trace()
    base = reference.cov.trace()
    gap = reference.mean - heavy.mean
    without = (gap + each * deviations).square().sum(dim=1) - 2.0 * roots
    without += base + trace - each * heavy.total * squares
    # All images at their own weight are this much less than the heavy mixture: of rank N, so the
    # eigenvalues are computed again, without vectors.
    off, seen_off = each * deviations.mean(dim=0), each * seen.mean(dim=0)
    less = each / len(features)
    inner = torch.diag(heavy.total * values) - less * (seen.T @ seen)
    inner -= torch.outer(seen_off, seen_off)
    root = torch.linalg.eigvalsh(inner).clamp_min(0.0).sqrt().sum()
    trace = trace - less * squares.sum() - off.square().sum()
    distance = (gap + off).square().sum() + base + trace - 2.0 * root
    return LeaveOneOut(distance, without)


@dataclass(frozen=True, slots=True, eq=False)
class _HeavyMixture:
    """A state and a batch, each image at the weight it has when another one is left out.

    The weights add up to `total` = 1 + each. About the mean of this mixture, leaving an image out
    is rank one: S_i = total * cov - each * total * g_i g_i^T, mean_i = mean - each * g_i.
    """

    each: float
    mean: Tensor  # [C]
    cov: Tensor  # [C, C]
    deviations: Tensor  # [N, C] g, of the images from `mean`

    @property
    def total(self) -> float:
        return 1.0 + self.each

    @classmethod
    def of(cls, features: Tensor, state: RawMoments, decay: float) -> "_HeavyMixture":
        each = (1.0 - decay) / (len(features) - 1)
        first, second = state.first / state.weight, state.second / state.weight
        mean = (decay * first + each * features.sum(dim=0)) / (1.0 + each)
        deviations, past = features - mean, first - mean
        # About `mean`, not about 0: both terms are positive and nothing large cancels but once.
        carried = second - torch.outer(first, first) + torch.outer(past, past)
        cov = (decay * carried + each * (deviations.T @ deviations)) / (1.0 + each)
        return cls(each, mean, cov, deviations)


class _Spectrum(NamedTuple):
    """Non-zero eigenvalues of A and what each image contributes to them."""

    values: Tensor  # [R] above 0
    shares: Tensor  # [N, R] s, at least 0
    at_zero: Tensor  # [N] 1 - sum of s: 0 where A loses a direction without the image


def _gram_spectrum(deviations: Tensor, reference: FrechetReference, divisor: int) -> _Spectrum:
    """By the images' Gram matrix, where there are no more images than features.

    Its eigenvectors in the images' space give s directly: n / (n - 1) times their squared entries.
    """
    num_images = len(deviations)
    basis = _centred_basis(num_images).to(deviations.device)
    contrasts = basis.T @ deviations
    gram = contrasts @ reference.cov @ contrasts.T / divisor
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    is_kept = values > _EPSILON * len(values) * values[-1].clamp_min(0.0)
    entries = (basis @ vectors).square() * (num_images / (num_images - 1))
    return _Spectrum(values[is_kept], entries[:, is_kept], entries[:, ~is_kept].sum(dim=1))


def _covariance_spectrum(
    deviations: Tensor, reference: FrechetReference, divisor: int
) -> _Spectrum:
    num_images = len(deviations)
    whitened = deviations @ reference.root
    values, vectors = torch.linalg.eigh(whitened.T @ whitened / divisor)
    seen = (whitened @ vectors).square()
    return _split(values, seen * (num_images / ((num_images - 1) * divisor)))


def _split(values: Tensor, squares: Tensor) -> _Spectrum:
    """Eigenvalues [C] and b / a y^2 [N, C] without the directions that are rounding alone."""
    is_kept = values > _EPSILON * len(values) * values[-1].clamp_min(0.0)
    kept = values[is_kept]
    shares = squares[:, is_kept] / kept
    return _Spectrum(kept, shares, (1.0 - shares.sum(dim=1)).clamp_min(0.0))


def _centred_basis(size: int) -> Tensor:
    """[size, size - 1] orthonormal columns, each adding up to 0 (Householder's reflection)."""
    axis = torch.full((size,), size**-0.5, dtype=torch.float64)
    axis[0] += 1.0
    return (torch.eye(size, dtype=torch.float64) - torch.outer(axis, axis) / axis[0])[:, 1:]


def _root_traces(values: Tensor, shares: Tensor, at_zero: Tensor) -> Tensor:
    """[N] tr A_i^1/2, from the eigenvalues m [R] of a A, s [N, R] and d(0) [N]."""
    whole = values.sqrt().sum()
    lost = (shares * values).sum(dim=1)  # p = b |y|^2
    is_felt = lost > 0
    if not is_felt.any():
        return whole.expand(len(lost))
    # At large t, log d = -p/t + (p k - p^2/2)/t^2 with this k; k - p >= 0 since A_i has no
    # negative eigenvalue.
    far = (shares * values.square()).sum(dim=1) / lost.where(is_felt, lost.new_ones(()))
    near = (far - lost).clamp_min(0.0)
    # Every singularity scales with the eigenvalues, so the nodes do.
    nodes = torch.arange(_LOWEST, _HIGHEST, _STEP, dtype=torch.float64, device=values.device)
    t = (nodes + math.log(values[-1].item())).exp()
    taken = shares @ (values[:, None] / (values[:, None] + t))
    rest = at_zero[:, None] + shares @ (t / (values[:, None] + t))
    alike_taken = lost[:, None] / (far[:, None] + t)
    alike_rest = (near[:, None] + t) / (far[:, None] + t)
    gap = _log_of(taken, rest) - _log_of(alike_taken, alike_rest)
    integral = (gap * t.sqrt()).sum(dim=1) * (_STEP / (2.0 * math.pi))
    change = integral + near.sqrt() - far.sqrt()
    return whole + change.where(is_felt, change.new_zeros(()))


def _log_of(taken: Tensor, rest: Tensor) -> Tensor:
    """log d, from 1 - d where that is small and from d where it is not."""
    return torch.where(taken < 0.5, torch.log1p(-taken.clamp_max(0.5)), rest.log())
