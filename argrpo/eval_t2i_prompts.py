"""The prompts of `argrpo eval t2i`, encoded before any policy is in memory."""

from pathlib import Path
from typing import Any

import torch

from argrpo.data import Prompt, PromptSet
from argrpo.encoded_texts import TextLayout
from argrpo.eval_t2i_config import T2iConfig
from argrpo.model_paths import blamed_on, named_within, resolve_path
from argrpo.models.text_layout import text_layout
from argrpo.progress import Report
from argrpo.prompt_folders import check_records, read_records
from argrpo.ranks import node_leader_first
from argrpo.run_prompts import encode_texts, load_run_prompts


def prompts_of(
    config: T2iConfig, device: torch.device, report: Report
) -> tuple[PromptSet, list[dict[str, Any]]]:
    """Prompts as the policies read them, and what a benchmark says of each.

    Args:
        config: data and metadata.
        device: where an encoder computes, should a text not be in the cache.
        report: told ("texts", encoded so far, in all) while any are.

    Raises:
        ValueError: prompts, records or an encoder that do not fit, or policies that read texts in
            different ways.
        FileNotFoundError: a path is not there.
    """
    layout = _layout(config)
    records = None
    if config.metadata is not None:
        records = read_records(Path(config.metadata), config.layout)
    with node_leader_first("texts"):
        prompts = _prompts(config, layout, records, device, report)
    if records is None:
        return prompts, [{"prompt": prompt.text} for prompt in prompts.prompts]
    check_records(records, prompts.prompts)
    return prompts, records


def _layout(config: T2iConfig) -> TextLayout | None:
    """How all policies want their texts; None for policies that read labels."""
    layouts = []
    for path in config.policies.values():
        with blamed_on("compare" if config.compare else "policy"):
            place = resolve_path(path, config.cache_dir)
            layouts.append(text_layout(place, text_padding=config.text_padding))
    if len(set(layouts)) > 1:
        raise ValueError(
            f"compare: expected policies that read texts alike, got {layouts[0]} and "
            f"{next(layout for layout in layouts if layout != layouts[0])}"
        )
    return layouts[0]


def _prompts(
    config: T2iConfig,
    layout: TextLayout | None,
    records: list[dict[str, Any]] | None,
    device: torch.device,
    report: Report,
) -> PromptSet:
    is_elsewhere = config.data.prompts is not None or config.data.text_features is not None
    if records is None or layout is None or is_elsewhere:
        return load_run_prompts(
            config.data, layout, device=device, cache_dir=config.cache_dir, report=report
        )
    texts = [str(record["prompt"]) for record in records]
    with named_within("data"):
        encoded = encode_texts(
            texts,
            config.data.text_encoder,
            layout,
            device=device,
            cache_dir=config.cache_dir,
            report=report,
        )
    return PromptSet([Prompt(text, prompt_id=row) for row, text in enumerate(texts)], encoded)
