"""Images of prompts in the folders that benchmarks' own tools read, and those tools' prompt files.

    00000/metadata.jsonl      one line, what the benchmark's file says of prompt 0
    00000/samples/0000.png    its images
    00001/...

GenEval reads this tree; AR-GRPO writes DrawBench's images in the same. The tools need environments
of their own, so nothing of them runs here. Prompt files:

    GenEval     evaluation_metadata.jsonl: tag, include and prompt a line
    DrawBench   a table with columns Prompts and Category, or AR-GRPO's drawbench_test_1000.json

Source: djghosh13/geneval at af4902f, README and evaluation/evaluate_images.py;
Kwai-Klear/AR-GRPO at 65947ad, test_t2i.py and test_t2i_rewards.py.
"""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.image_files import save_image
from argrpo.run_folder import write_atomically

Layout = Literal["geneval", "drawbench"]

_TEXT = ("prompt", "Prompts", "Prompt", "text", "caption")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_GENEVAL_KEYS = ("tag", "include")


def read_records(path: Path, layout: Layout) -> list[dict[str, Any]]:
    """A benchmark's records in order, each with its text under `prompt`.

    Args:
        path: .jsonl, .json (a list), .csv or .tsv.
        layout: geneval also wants the keys that its evaluator reads.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it cannot be read, or a record lacks something; its number is named.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout: expected {' or '.join(get_args(Layout))}, got {layout!r}")
    if not path.is_file():
        raise FileNotFoundError(f"metadata: expected a file of prompts, got {path}")
    found = _rows(path)
    records = []
    for place, row in enumerate(found):
        text = _text_of(row)
        if text is None:
            raise ValueError(
                f"metadata: expected one of {', '.join(_TEXT)} in record {place} of {path}, got "
                f"{', '.join(map(str, row)) or 'nothing'}"
            )
        missing = [key for key in _GENEVAL_KEYS if key not in row] if layout == "geneval" else []
        if missing:
            raise ValueError(
                f"metadata: expected {missing[0]} in record {place} of {path}, as GenEval's "
                "evaluator reads it, got none; take layout drawbench for other prompts"
            )
        records.append({**row, "prompt": text})
    if not records:
        raise ValueError(f"metadata: expected prompts in {path}, got none")
    return records


def check_records(records: list[dict[str, Any]], prompts: list[Prompt]) -> None:
    """Refuse records that are not of these prompts, in their order.

    Raises:
        ValueError: the counts differ, or a text does; the first one is named.
    """
    if len(records) != len(prompts):
        raise ValueError(
            f"metadata: expected {len(prompts)} records, one a prompt of data, got {len(records)}"
        )
    for place, (record, prompt) in enumerate(zip(records, prompts, strict=True)):
        if record["prompt"].strip() != prompt.text.strip():
            raise ValueError(
                f"metadata: expected {prompt.text!r} in record {place}, as data has it, got "
                f"{record['prompt']!r}"
            )


class PromptFolders:
    """Writes the tree.

    Args:
        folder: above 00000; made if need be.
        records: of the prompts, each with `prompt`.
        repeats: images of each prompt.
    """

    def __init__(self, folder: Path, records: list[dict[str, Any]], repeats: int) -> None:
        self.folder, self._records, self._repeats = folder, records, repeats

    def path(self, image_id: int) -> Path:
        """The file of an image; those of one prompt follow each other."""
        prompt, sample = divmod(image_id, self._repeats)
        return self.folder / f"{prompt:05d}" / "samples" / f"{sample:04d}.png"

    def add(self, rows: range, pixels: Tensor) -> None:
        """Write images [n, H, W, 3] uint8, where they are not there yet.

        Raises:
            StorageError: the disk is full or refused.
        """
        for image_id, image in zip(rows, pixels, strict=True):
            path = self.path(image_id)
            if not path.is_file():
                # Levels / 255 give the same levels back by this rule.
                levels = image.permute(2, 0, 1).to(torch.float32) / 255.0
                save_image(levels, path, pixels="round")

    def finish(self) -> None:
        """Write what is said of the prompts."""
        for place, record in enumerate(self._records):
            line = json.dumps(record, ensure_ascii=False) + "\n"
            path = self.folder / f"{place:05d}" / "metadata.jsonl"
            write_atomically(path, partial(_write_text, line))


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in _DELIMITERS:
            lines = text.splitlines()
            return list(csv.DictReader(lines, delimiter=_DELIMITERS[path.suffix]))
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"metadata: expected .jsonl, .json, .csv or .tsv, got {path}: {error}"
        ) from (error)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"metadata: expected records with keys, got others in {path}")
    return rows


def _text_of(row: dict[str, Any]) -> str | None:
    for name in _TEXT:
        if isinstance(row.get(name), str):
            return str(row[name])
    talk = row.get("conversations")  # AR-GRPO's: what a human says first is the prompt
    if isinstance(talk, list) and talk and isinstance(talk[0], dict):
        said = talk[0].get("value")
        return said if isinstance(said, str) else None
    return None
