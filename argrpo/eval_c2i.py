"""`argrpo eval c2i`: images over classes, and the table of numbers that a paper prints of them.

Every policy draws at every guidance scale into a folder of its own; see evaluation/image_set.py
for how processes share the work and go on after an interruption.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from argrpo.devices import choose_device, free_memory
from argrpo.drawing_models import load_models
from argrpo.eval_c2i_config import C2iConfig, resolved
from argrpo.evaluation.class_measures import ClassMeasures, extractors_of
from argrpo.evaluation.features import FeatureExtractor
from argrpo.evaluation.image_set import ImageSet, NetworkLook
from argrpo.evaluation.image_source import DrawPlan, ImageSource
from argrpo.evaluation.sample_files import LABELS
from argrpo.evaluation.sharing import Share, own_share
from argrpo.models.pairing import check_guidance
from argrpo.progress import Report, unreported
from argrpo.ranks import is_first, meet
from argrpo.run_folder import write_atomically
from argrpo.sample_prompts import labels_of


class _Job(NamedTuple):
    """One policy at one guidance scale."""

    policy: str
    guidance_scale: float
    images: ImageSet
    labels: Tensor  # [N] int64


@dataclass(frozen=True, slots=True)
class C2iResults:
    """What was measured, as results.json has it."""

    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    """One a policy and guidance scale: their names, and the metrics; None where a number was not
    finite."""
    best: dict[str, dict[str, Any]]
    """The best row of each policy by `best_by`; a policy without a finite value is left out."""


def evaluate_classes(config: C2iConfig, report: Report = unreported) -> C2iResults | None:
    """Draw this process's share of the images, and measure where all are there.

    Args:
        config: what to draw and measure.
        report: told (images of a policy and guidance scale, done, in all of this process).

    Returns:
        The results, which also stand in results.json; None where other processes still draw, and
        on all ranks but the first.

    Raises:
        ValueError: a model, class or reference that does not fit, or a folder of other images.
        FileNotFoundError: a path is not there.
        StorageError: the disk is full or refused.
    """
    config = resolved(config)
    device = choose_device(config.device)
    extractors = extractors_of(config, device)
    looks = [NetworkLook(extractor) for extractor in extractors.values()]
    share = own_share(config.shard, config.num_shards)
    # Looked at before the work of hours, by one of the processes.
    measures = ClassMeasures(config, extractors, device) if share.index == 0 else None
    jobs = []
    for name in config.policies:
        jobs += _drawn_by(name, config, device, looks, share, report)
        # What the call left, before the next policy comes.
        free_memory(device)
    meet("eval c2i: images are drawn")
    if not is_first() or any(job.images.missing(looks) for job in jobs):
        return None
    if measures is None:
        measures = ClassMeasures(config, extractors, device)
    return _measured(config, jobs, measures, extractors)


def classes_of(config: C2iConfig, num_classes: int) -> Tensor:
    """[N] int64: the class of each image.

    Args:
        config: which classes, and how they are spread over the images.
        num_classes: that the policy knows.

    Raises:
        ValueError: a name that no class has, or a label that the policy does not know.
    """
    chosen = config.labels
    if config.names is not None:
        chosen = labels_of(config.names, config.names_from)
    known = torch.tensor(range(num_classes) if chosen is None else chosen)
    outside = known[(known < 0) | (known >= num_classes)]
    if len(outside):
        raise ValueError(
            f"labels: expected 0 to {num_classes - 1}, as the policy knows, got {int(outside[0])}"
        )
    if config.classes == "balanced":
        return known[torch.arange(config.num_images) % len(known)]
    return known[[_drawn(config.seed, i, len(known)) for i in range(config.num_images)]]


def _drawn(seed: int, image_id: int, count: int) -> int:
    """A class by image id, so that more images leave the first ones as they are."""
    digest = hashlib.blake2b(f"class {seed} {image_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % count


def _drawn_by(
    name: str,
    config: C2iConfig,
    device: torch.device,
    looks: list[NetworkLook],
    share: Share,
    report: Report,
) -> list[_Job]:
    """A share of one policy's images at all scales. The policy is gone when this returns."""
    path = config.policies[name]
    policy, tokenizer = load_models(config, path, device, setting=config.policies_setting)
    if policy.config.model_type != "c2i":
        raise ValueError(
            f"policy: expected class-conditional policies, got {path}, which reads texts; "
            "argrpo eval t2i takes it"
        )
    check_guidance(policy, "guidance_scales", *config.guidance_scales)
    labels = classes_of(config, policy.config.num_classes)
    batch = min(config.batch, config.num_images)
    plan = DrawPlan(labels, config.seed, batch, config.decode_batch, config.pixels)
    source = ImageSource(policy, tokenizer, plan)
    jobs = []
    for scale in config.guidance_scales:
        params = config.sampling_params(scale)
        folder = Path(config.output_dir) / name / f"guidance_{scale:g}"
        images = ImageSet(folder, config.num_images, batch, source.settings(params))
        stage = partial(report, f"{name}, guidance {scale:g}")
        images.make(partial(source.draw, params=params), looks, share, stage)
        jobs.append(_Job(name, scale, images, labels))
    return jobs


def _measured(
    config: C2iConfig,
    jobs: list[_Job],
    measures: ClassMeasures,
    extractors: dict[str, FeatureExtractor],
) -> C2iResults:
    rows = []
    for job in jobs:
        job.images.finish({LABELS: job.labels.numpy().astype(np.int64)})
        metrics = measures.measure(job.images, job.labels)
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        rows.append({"policy": job.policy, "guidance_scale": job.guidance_scale, **finite})
    seen_by = {f"{prefix}features": each.name for prefix, each in extractors.items()}
    results = C2iResults({**asdict(config), **seen_by}, rows, _best(config, rows))
    text = json.dumps(asdict(results), indent=2) + "\n"
    write_atomically(Path(config.output_dir) / "results.json", lambda part: part.write_text(text))
    return results


def _best(config: C2iConfig, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    best: dict[str, dict[str, Any]] = {}
    by = config.best_by
    choose = min if config.lower_is_better else max
    for name in config.policies:
        own = [row for row in rows if row["policy"] == name and row.get(by) is not None]
        if own:
            best[name] = choose(own, key=lambda row: float(row[by]))
    return best
