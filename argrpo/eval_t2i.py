"""`argrpo eval t2i`: images of prompts by one or more policies, what judges say of them, who wins.

A policy's folder holds images/ for a benchmark's own tools, scores.jsonl, and what is needed to go
on after an interruption (see evaluation/image_set.py).

Shapes: M images of a policy, J judges.
"""

import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from argrpo.data import Prompt, PromptSet
from argrpo.devices import choose_device, free_memory
from argrpo.drawing_models import load_models
from argrpo.eval_t2i_config import T2iConfig
from argrpo.eval_t2i_prompts import prompts_of
from argrpo.evaluation.diversity import distance_within, has_pairs, thumbnails
from argrpo.evaluation.features import load_extractor
from argrpo.evaluation.image_set import ImageSet, Look, NetworkLook
from argrpo.evaluation.image_source import DrawPlan, ImageSource
from argrpo.evaluation.judge_panel import SCORES, JudgePanel, win_rate, win_rate_error
from argrpo.evaluation.sharing import Share, own_share
from argrpo.model_paths import resolve_path
from argrpo.models.pairing import check_guidance
from argrpo.progress import Report, unreported
from argrpo.prompt_folders import PromptFolders
from argrpo.ranks import is_first, meet
from argrpo.run_folder import write_atomically


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class PolicyImages:
    """One policy's images and what was said of them."""

    name: str
    folders: PromptFolders
    scores: Tensor  # [M, J] fp32, NaN = not scored
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class T2iResults:
    """All policies, the base first."""

    settings: dict[str, Any]
    prompts: list[Prompt]
    judges: list[str]
    policies: list[PolicyImages]

    def rows(self) -> list[dict[str, Any]]:
        """One object a policy; None where a number was not finite."""
        return [
            {"policy": each.name}
            | {k: v if math.isfinite(v) else None for k, v in each.metrics.items()}
            for each in self.policies
        ]


class _Job(NamedTuple):
    name: str
    images: ImageSet


class _Looks(NamedTuple):
    """Who looks at the images; the same for every policy."""

    panel: JudgePanel
    network: NetworkLook | None

    def all(self) -> list[Look]:
        network = [] if self.network is None else [self.network]
        return [self.panel, *network]


def evaluate_texts(config: T2iConfig, report: Report = unreported) -> T2iResults | None:
    """Draw and judge this process's share of the images, and compare where all are there.

    Args:
        config: what to draw, and who judges.
        report: told (images of a policy, batches done, in all of this process).

    Returns:
        The results, which also stand in results.json; None where other processes still draw, and
        on all ranks but the first.

    Raises:
        ValueError: a model, prompt, record or judge that does not fit, or a folder of other images.
        FileNotFoundError: a path is not there.
        StorageError: the disk is full or refused.
    """
    device = choose_device(config.device)
    prompts, records = prompts_of(config, device, report)
    share = own_share(config.shard, config.num_shards)
    looks = _looks(config, prompts.prompts, device)
    jobs = []
    try:
        for name in config.policies:
            jobs.append(_drawn_by(name, config, prompts, device, looks, share, report))
            # What the call left, before the next policy comes.
            free_memory(device)
    finally:
        looks.panel.close()
    meet("eval t2i: images are drawn and judged")
    if not is_first() or any(job.images.missing(looks.all()) for job in jobs):
        return None
    return _compared(config, prompts.prompts, records, jobs, looks)


def _looks(config: T2iConfig, prompts: list[Prompt], device: torch.device) -> _Looks:
    repeated = [prompt for prompt in prompts for _ in range(config.num_images_per_prompt)]
    panel = JudgePanel(
        config.judges,
        repeated,
        device,
        cache_dir=config.cache_dir,
        deadline_s=config.deadline_s,
    )
    if config.features_path is None:
        return _Looks(panel, None)
    path = resolve_path(config.features_path, config.cache_dir)
    return _Looks(panel, NetworkLook(load_extractor(config.features, path, device=device)))


def _drawn_by(
    name: str,
    config: T2iConfig,
    prompts: PromptSet,
    device: torch.device,
    looks: _Looks,
    share: Share,
    report: Report,
) -> _Job:
    """A share of one policy's images, drawn and judged. The policy is gone when this returns."""
    conditions = prompts.conditions(prompts.prompts, config.num_images_per_prompt)
    num_images = len(prompts) * config.num_images_per_prompt
    batch = min(config.batch, num_images)
    plan = DrawPlan(conditions, config.seed, batch, config.decode_batch, config.pixels)
    policy, tokenizer = load_models(
        config, config.policies[name], device, setting=config.policies_setting
    )
    check_guidance(policy, "guidance_scale", config.guidance_scale)
    source = ImageSource(policy, tokenizer, plan)
    params = config.sampling_params(config.guidance_scale)
    folder = Path(config.output_dir) / name
    images = ImageSet(folder, num_images, batch, source.settings(params))
    draw = partial(source.draw, params=params)
    images.make(draw, looks.all(), share, partial(report, name))
    return _Job(name, images)


def _compared(
    config: T2iConfig,
    prompts: list[Prompt],
    records: list[dict[str, Any]],
    jobs: list[_Job],
    looks: _Looks,
) -> T2iResults:
    groups = torch.arange(len(prompts)).repeat_interleave(config.num_images_per_prompt)
    judges = looks.panel.judge_names
    policies: list[PolicyImages] = []
    for job in jobs:
        job.images.finish({})
        folders = PromptFolders(job.images.folder / "images", records, config.num_images_per_prompt)
        pixels = []
        for rows, part in job.images.batches():
            folders.add(rows, part)
            pixels.append(thumbnails(part.permute(0, 3, 1, 2).float() / 255.0))
        folders.finish()
        scores = job.images.seen(looks.panel)[SCORES]
        base = policies[0].scores if policies else scores
        metrics = _judged(judges, scores, base, groups)
        metrics |= _diversity(job.images, looks.network, torch.cat(pixels), groups)
        policies.append(PolicyImages(job.name, folders, scores, metrics))
        _write_scores(job.images.folder, prompts, groups, folders, judges, scores)
    results = T2iResults(asdict(config), prompts, judges, policies)
    text = json.dumps({"settings": results.settings, "rows": results.rows()}, indent=2) + "\n"
    write_atomically(Path(config.output_dir) / "results.json", lambda part: part.write_text(text))
    return results


def _judged(judges: list[str], scores: Tensor, base: Tensor, groups: Tensor) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, column, before in zip(judges, scores.unbind(1), base.unbind(1), strict=True):
        scored = column[column.isfinite()]
        found[f"{name}/mean"] = scored.mean().item()
        found[f"{name}/std"] = scored.std().item() if len(scored) > 1 else 0.0
        found[f"{name}/not_scored"] = float(len(column) - len(scored))
        if base is not scores:
            found[f"{name}/win_rate"] = win_rate(column, before)
            found[f"{name}/win_rate_error"] = win_rate_error(column, before, groups)
    return found


def _diversity(
    images: ImageSet, network: NetworkLook | None, pixels: Tensor, groups: Tensor
) -> dict[str, float]:
    found = {"entropy": images.entropies().mean().item()}
    if has_pairs(groups):
        if network is not None:
            features = images.seen(network)["features"]
            found["pairwise_distance"] = distance_within(features, groups)
        found["pairwise_pixels"] = distance_within(pixels, groups)
    return found


def _write_scores(
    folder: Path,
    prompts: list[Prompt],
    groups: Tensor,
    folders: PromptFolders,
    judges: list[str],
    scores: Tensor,
) -> None:
    """scores.jsonl: one object an image."""
    lines = []
    for image_id, (prompt, row) in enumerate(zip(groups.tolist(), scores.tolist(), strict=True)):
        said = {j: s if math.isfinite(s) else None for j, s in zip(judges, row, strict=True)}
        file = str(folders.path(image_id).relative_to(folder))
        entry = {"prompt_id": prompt, "prompt": prompts[prompt].text, "file": file, "scores": said}
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    path = folder / "scores.jsonl"
    write_atomically(path, lambda part: part.write_text("".join(lines), encoding="utf-8"))
