"""What a policy draws while it is trained, measured at fixed seeds and conditions.

Ranks share the images and measure all of them, so each has the same numbers.

Nothing of it reaches the training: images, judges and random numbers are its own, and the weights
are only read.

Shapes: M images of an evaluation, J judges, C features.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.config import TrainConfig
from argrpo.data import Prompt, PromptSet
from argrpo.engine.conditions import select
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.evaluation.diversity import distance_within, has_pairs, thumbnails
from argrpo.evaluation.features import load_extractor
from argrpo.evaluation.judge_panel import make_panel, scores_of, win_rate
from argrpo.evaluation.set_measures import SetMeasures
from argrpo.model_paths import blamed_on, named_within, resolve_path
from argrpo.models.vq import VQTokenizer
from argrpo.pixels import seen_by_judges
from argrpo.ranks import gather_images, num_ranks, own_rank
from argrpo.rewards.background_loop import BackgroundLoop
from argrpo.rewards.pool import Asking


class _View(NamedTuple):
    """A way to draw, and what its metrics begin with."""

    prefix: str
    params: SamplingParams


@dataclass(frozen=True, slots=True, eq=False)
class _Looks:
    """What was seen of the images of one view."""

    scores: Tensor  # [M, J] fp32 on the CPU, NaN = not scored
    features: Tensor | None  # [M, C]
    pixels: Tensor  # [M, P] of thumbnails, on the CPU
    entropy: float  # nats a token, of the distribution drawn from


class Evaluation:
    """Draws from the policy as it is, and measures. The first call is of the base policy."""

    def __init__(self, config: TrainConfig, prompts: PromptSet, device: torch.device) -> None:
        """Load judges, network and references.

        Raises:
            ValueError: a judge, moments or a metric's name that do not fit, named.
            FileNotFoundError: a path is not there.
        """
        settings = config.eval
        self._config, self._device = config, device
        self._prompts = spread(prompts.prompts, settings.num_images)
        self._conditions = prompts.conditions(self._prompts, 1)
        if settings.num_images < num_ranks():
            raise ValueError(
                f"eval.num_images: expected at least one for each of {num_ranks()} ranks, got "
                f"{settings.num_images}"
            )
        self._own = torch.arange(settings.num_images).tensor_split(num_ranks())[own_rank()]
        self._groups = torch.tensor([prompt.prompt_id for prompt in self._prompts])
        self._seed = evaluation_seed(settings.seed)
        self._views = _views(settings.guidance_scales, config.rollout)
        # Building a network draws random weights before those of its file come.
        with _own_randomness(device):
            self._judges = make_panel(settings.judges, "eval.judges", device, config.cache_dir)
            self._measures = _set_measures(config, device)
        self._asking = Asking(BackgroundLoop(), config.judging.deadline_s)
        self._base: list[Tensor] = []  # scores [M, J] of each view, of the first call
        best = settings.best_metric
        if best is not None and best not in self.names:
            raise ValueError(
                f"eval.best_metric: expected one of {', '.join(self.names)}, got {best}"
            )

    @property
    def names(self) -> list[str]:
        """Names of all metrics, as they are logged."""
        kinds = [f"{j.name}/{k}" for j in self._judges for k in ("mean", "std", "win_rate")]
        kinds += [] if self._measures is None else self._measures.names
        if has_pairs(self._groups):
            kinds += [] if self._measures is None else ["pairwise_distance"]
            kinds += ["pairwise_pixels"]
        return [f"{view.prefix}{kind}" for view in self._views for kind in [*kinds, "entropy"]]

    @torch.no_grad()
    def measure(self, engine: RolloutEngine, tokenizer: VQTokenizer) -> dict[str, float]:
        """Draw and measure.

        Returns:
            A value for each of `names`, NaN where nothing could be measured; and eval/seconds.
        """
        started = time.perf_counter()
        try:
            with _own_randomness(self._device):
                looks = [self._look(engine, tokenizer, view.params) for view in self._views]
        finally:
            self._asking.close(self._judges)
        if not self._base:
            self._base = [look.scores for look in looks]
        metrics: dict[str, float] = {}
        for view, look, base in zip(self._views, looks, self._base, strict=True):
            found = {**self._judged(look.scores, base), "entropy": look.entropy}
            if self._measures is not None and look.features is not None:
                found |= self._measures.measure(look.features)
            found |= self._diversity(look)
            metrics |= {f"{view.prefix}{kind}": value for kind, value in found.items()}
        return {**metrics, "eval/seconds": time.perf_counter() - started}

    def state_dict(self) -> dict[str, Tensor]:
        """The scores of the base policy, of each view by its number."""
        return {f"base.{place}": scores for place, scores in enumerate(self._base)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: it is of other judges, images or guidance scales.
        """
        wanted = (len(self._prompts), len(self._judges))
        shapes = {name: tuple(scores.shape) for name, scores in state.items()}
        names = [f"base.{place}" for place in range(len(self._views))]
        if state and shapes != dict.fromkeys(names, wanted):
            raise ValueError(
                f"eval: expected scores of {wanted[0]} images by {wanted[1]} judges in "
                f"{len(names)} views, got {shapes}"
            )
        self._base = [state[name] for name in names] if state else []

    def _look(
        self, engine: RolloutEngine, tokenizer: VQTokenizer, params: SamplingParams
    ) -> _Looks:
        """Images are decoded, seen and let go, as many at a time as a step of the training has."""
        own, conditions = self._own, select(self._conditions, self._own)
        rollout = engine.draw(conditions, params, seed=self._seed, image_ids=own)
        prompts = [self._prompts[row] for row in own.tolist()]
        scores, features, pixels = [], [], []
        count, settings = self._config.images_per_step, self._config.tokenizer
        for start in range(0, len(rollout), count):
            part = rollout.token_ids[start : start + count]
            images = tokenizer.decode(part, decode_batch=settings.decode_batch)
            seen = seen_by_judges(images, settings.pixels)
            part_prompts = prompts[start : start + count]
            scores.append(scores_of(self._judges, seen, part_prompts, self._asking, "eval.judges"))
            pixels.append(thumbnails(seen))
            if self._measures is not None:
                features.append(self._measures.features(seen))
        entropies = rollout.entropies.double().mean(dim=1, keepdim=True).cpu()
        return _Looks(
            gather_images(torch.cat(scores), own),
            gather_images(torch.cat(features), own) if features else None,
            gather_images(torch.cat(pixels), own),
            gather_images(entropies, own).mean().item(),
        )

    def _diversity(self, look: _Looks) -> dict[str, float]:
        """How different the images of one prompt are; nothing where each prompt has one image."""
        if not has_pairs(self._groups):
            return {}
        found = {} if look.features is None else {"pairwise_distance": look.features}
        found["pairwise_pixels"] = look.pixels
        return {name: distance_within(rows, self._groups) for name, rows in found.items()}

    def _judged(self, scores: Tensor, base: Tensor) -> dict[str, float]:
        found: dict[str, float] = {}
        for judge, column, before in zip(
            self._judges, scores.unbind(1), base.unbind(1), strict=True
        ):
            scored = column[column.isfinite()]
            found[f"{judge.name}/mean"] = scored.mean().item()
            found[f"{judge.name}/std"] = scored.std().item() if len(scored) > 1 else 0.0
            found[f"{judge.name}/win_rate"] = win_rate(column, before)
        return found


def spread(prompts: list[Prompt], count: int) -> list[Prompt]:
    """`count` prompts: each equally often, or evenly spaced ones where there are more."""
    size = len(prompts)
    if count < size:
        return [prompts[place * size // count] for place in range(count)]
    return [prompts[place % size] for place in range(count)]


def evaluation_seed(seed: int) -> int:
    """64 bits hashed from eval.seed; no draw of a training has them."""
    digest = hashlib.blake2b(f"evaluation {seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _views(scales: list[float], drawn: SamplingParams) -> list[_View]:
    first, *others = scales or [drawn.guidance_scale]
    views = [_View("eval/", replace(drawn, guidance_scale=first))]
    for scale in others:
        params = replace(drawn, guidance_scale=scale)
        views.append(_View(f"eval/guidance_{scale:g}/", params))
    return views


def _set_measures(config: TrainConfig, device: torch.device) -> SetMeasures | None:
    settings = config.eval
    if settings.features_path is None or settings.reference is None:
        return None
    path = resolve_path(settings.features_path, config.cache_dir)
    with named_within("eval"):
        extractor = load_extractor(settings.features, path, device=device)
    with blamed_on("eval.reference"):
        return SetMeasures(
            extractor,
            settings.reference,
            image_size=settings.image_size,
            neighbours=settings.neighbours,
            device=device,
        )


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """What draws random numbers inside leaves torch's generators as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
