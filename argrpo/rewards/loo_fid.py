"""How much better an image makes the distribution of all images: leave-one-out Frechet distance.

    score_i = D(all images but i) - D(all images)          above 0: without it the distance grows

D is the Frechet distance of the images' features to a reference. The images of a step are mixed
into moments carried from the steps before, since few images alone say little about a distribution.

    diagonal   features as if independent: |mu_r - mu|^2 + |sd_r - sd|^2, as released
    full       the usual distance with all covariances, exact, for one eigendecomposition a step

Shapes: N images of a step over all ranks, C features.

Source: Baran et al., arXiv:2603.23086; bugrabaran/ar-policy-tuning at fac5b31,
utils/reward_utils.py, whose mode ema_loo is the diagonal form and loo_batch the same with decay 0.
"""

import logging
from typing import Literal, get_args

import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.evaluation.features import load_extractor
from argrpo.evaluation.frechet_diagonal import diagonal_leave_one_out
from argrpo.evaluation.frechet_loo import (
    FrechetReference,
    LeaveOneOut,
    batch_leave_one_out,
    carried_leave_one_out,
)
from argrpo.evaluation.moments import Moments, RawMoments
from argrpo.evaluation.reference_moments import reference_moments
from argrpo.model_paths import blamed_on, named_within
from argrpo.ranks import gather_rows

_LOG = logging.getLogger(__name__)

Form = Literal["diagonal", "full"]


class LooFidReward:
    """Leave-one-out Frechet distance to a reference; see the top of this file."""

    def __init__(
        self,
        reference: str,
        features_path: str,
        *,
        features: str = "inception",
        form: Form = "diagonal",
        decay: float = 0.5,
        initial: str | None = None,
        debias: bool = True,
        parity_bootstrap: bool = False,
        image_size: int | None = None,
        device: torch.device,
        reward_batch: int = 64,
        name: str = "loo_fid",
    ) -> None:
        """Load the network and the reference.

        One argument for each option of the config, so more than is usual here.

        Args:
            reference: an npz file of moments, a folder of images, or dataset:digits/SPLIT.
            features_path: weights of the network.
            features: which network, a kind of evaluation/features.py.
            form: diagonal or full.
            decay: what the carried moments count in a step's mixture, in [0, 1); 0 compares the
                images of a step alone.
            initial: where the carried moments begin, as `reference`: images of the policy before
                training. None: nowhere, and the first step counts whole.
            debias: divide carried moments by what their weights add up to. False as released; it
                then takes `initial`, or the first moments are too small.
            parity_bootstrap: count `initial` as one batch, times 1 - decay, as released. Without
                debias the first steps then see moments that are too small.
            image_size: to which images of a folder are cropped and resized first.
            device: where the network runs and matrices are decomposed.
            reward_batch: images in the network at a time; bounds memory.
            name: under which its scores are logged.

        Raises:
            ValueError: an option is out of range, or moments are of other features, named.
            FileNotFoundError: a path is not there.
        """
        self.name = name
        place = f"rewards.{name}.options"
        _check(place, form, decay, debias=debias, parity=parity_bootstrap)
        if parity_bootstrap and initial is None:
            raise ValueError(
                f"{place}.initial: expected moments to begin with, since parity_bootstrap says how "
                "they count, got none"
            )
        with named_within(place):
            extractor = load_extractor(features, features_path, device=device, batch=reward_batch)
        self._extractor = extractor
        self._decay = decay
        is_full = form == "full"
        with blamed_on(f"{place}.reference"):
            target = reference_moments(reference, extractor, image_size=image_size).to(device)
            self._form: _Diagonal | _Full = (
                _Full(target, decay) if is_full else _Diagonal(target, decay, debias)
            )
        self._state = RawMoments.empty(extractor.dim, full=is_full).to(device)
        if initial is not None:
            with blamed_on(f"{place}.initial"):
                begin = reference_moments(initial, extractor, image_size=image_size)
                weight = 1.0 - decay if parity_bootstrap else 1.0
                self._state = RawMoments.of(begin, full=is_full, weight=weight).to(device)
        self._next: RawMoments | None = None
        self._distance = torch.nan

    @torch.no_grad()
    def score(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """What each image is worth; moves no state.

        Args:
            images: [n, 3, H, W] in [0, 1], this rank's images of a step.
            prompts: n of them; not looked at.

        Returns:
            [n] fp32 on the CPU. NaN for an image whose features are not finite, and for all where
            too few of all ranks' images are left to leave one out.
        """
        features, own = gather_rows(self._extractor(images))
        is_finite = features.isfinite().all(dim=1)
        counted = features[is_finite].double()
        scores = torch.full((len(features),), torch.nan)
        self._next, self._distance = None, torch.nan
        if len(counted) >= self._form.least_images:
            found = self._form.leave_one_out(counted, self._state)
            scores[is_finite.cpu()] = (found.without - found.distance).float().cpu()
            self._next = self._state.updated(counted, self._decay)
            self._distance = found.distance.item()
        else:
            _LOG.warning(
                "%s: expected at least %d images with finite features, got %d; none is scored",
                self.name,
                self._form.least_images,
                len(counted),
            )
        return scores[own]

    def update(self) -> None:
        """Mix the images scored last into the carried moments."""
        if self._next is not None:
            self._state, self._next = self._next, None

    def metrics(self) -> dict[str, float]:
        """The distance of all images scored last, mixed in; NaN where none was."""
        return {"distance": self._distance}

    def state_dict(self) -> dict[str, Tensor]:
        """The carried moments, and those that `update` would move to."""
        state = _named(self._state, "")
        return state if self._next is None else state | _named(self._next, "next_")

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: it is of another form or other features.
        """
        device = self._state.first.device
        for key in ("first", "second"):
            wanted, got = getattr(self._state, key).shape, state[key].shape
            if wanted != got:
                raise ValueError(
                    f"{self.name}.{key}: expected a state of shape {list(wanted)}, got {list(got)}"
                )
        self._state = _moments(state, "").to(device)
        self._next = _moments(state, "next_").to(device) if "next_first" in state else None


def _named(moments: RawMoments, prefix: str) -> dict[str, Tensor]:
    weight = torch.tensor(moments.weight, dtype=torch.float64)
    parts = {"first": moments.first, "second": moments.second, "weight": weight}
    return {f"{prefix}{name}": value for name, value in parts.items()}


def _moments(state: dict[str, Tensor], prefix: str) -> RawMoments:
    first, second, weight = (state[f"{prefix}{name}"] for name in ("first", "second", "weight"))
    return RawMoments(first, second, float(weight))


class _Diagonal:
    least_images = 2

    def __init__(self, reference: Moments, decay: float, debias: bool) -> None:
        self._reference = reference
        self._decay = decay
        self._debias = debias

    def leave_one_out(self, features: Tensor, state: RawMoments) -> LeaveOneOut:
        return diagonal_leave_one_out(
            features, state, self._reference, decay=self._decay, debias=self._debias
        )


class _Full:
    def __init__(self, reference: Moments, decay: float) -> None:
        self._reference = FrechetReference.of(reference)
        self._decay = decay
        # A batch alone has the unbiased covariance, as the usual distance; carried moments are
        # averages, so their covariance is the biased one, from the first batch on.
        self._correction = 1 if decay == 0 else 0
        self.least_images = 2 + self._correction

    def leave_one_out(self, features: Tensor, state: RawMoments) -> LeaveOneOut:
        past = self._decay * state.weight
        if past == 0:
            return batch_leave_one_out(features, self._reference, correction=self._correction)
        share = past / (past + 1.0 - self._decay)
        return carried_leave_one_out(features, state, self._reference, decay=share)


def _check(place: str, form: str, decay: float, *, debias: bool, parity: bool) -> None:
    if form not in get_args(Form):
        raise ValueError(f"{place}.form: expected diagonal or full, got {form!r}")
    if not 0 <= decay < 1:
        raise ValueError(f"{place}.decay: expected a number in [0, 1), got {decay}")
    if form == "full" and (parity or not debias):
        wrong = "parity_bootstrap: expected false" if parity else "debias: expected true"
        raise ValueError(
            f"{place}.{wrong} with form full, whose covariances need moments at full weight"
        )
