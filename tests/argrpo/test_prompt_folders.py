"""Benchmarks' prompt files, and the tree that GenEval's evaluator walks."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from argrpo.data import Prompt
from argrpo.prompt_folders import PromptFolders, check_records, read_records

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"},
    {"tag": "two_object", "include": [{"class": "cow", "count": 1}], "prompt": "a cow, “here”"},
]


def geneval_file(folder: Path) -> Path:
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in GENEVAL))
    return path


def as_geneval_walks(image_dir: Path) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Folders, records and images as evaluation/evaluate_images.py finds them."""
    found = {}
    for folder in image_dir.iterdir():
        if folder.is_dir() and folder.name.isdigit():
            (line,) = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
            names = [path.name for path in (folder / "samples").iterdir()]
            images = sorted(name for name in names if re.match(r"\d+\.png", name))
            found[folder.name] = (json.loads(line), images)
    return found


def test_the_tree_is_what_genevals_evaluator_reads(tmp_path: Path) -> None:
    records = read_records(geneval_file(tmp_path), "geneval")
    folders = PromptFolders(tmp_path / "images", records, 3)
    pixels = torch.randint(256, (6, 8, 8, 3), dtype=torch.uint8)
    folders.add(range(0, 4), pixels[:4])
    folders.add(range(4, 6), pixels[4:])
    folders.finish()
    names = ["0000.png", "0001.png", "0002.png"]
    assert as_geneval_walks(tmp_path / "images") == {
        "00000": (GENEVAL[0], names),
        "00001": (GENEVAL[1], names),
    }
    for image_id, wanted in enumerate(pixels.numpy()):
        assert np.array_equal(np.asarray(Image.open(folders.path(image_id))), wanted)
    assert folders.path(4) == tmp_path / "images" / "00001" / "samples" / "0001.png"


def test_all_levels_survive(tmp_path: Path) -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    folders = PromptFolders(tmp_path, [{"prompt": "grey"}], 1)
    folders.add(range(1), levels)
    assert np.array_equal(np.asarray(Image.open(folders.path(0))), levels[0].numpy())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("drawbench.csv", 'Prompts,Category\n"A red, round car",Colors\n"Two ""cats""",Counting\n'),
        (
            "drawbench.tsv",
            'Prompts\tCategory\nA red, round car\tA\n"Two ""cats"""\tB\n',
        ),
        (
            "drawbench_test_1000.json",
            json.dumps(
                [
                    {"id": f"draw_bench_test_{i:05d}", "conversations": [{"value": text}]}
                    for i, text in enumerate(["A red, round car", 'Two "cats"'])
                ]
            ),
        ),
        ("prompts.jsonl", '{"text": "A red, round car"}\n\n{"caption": "Two \\"cats\\""}\n'),
    ],
)
def test_drawbenchs_files_are_read_whatever_form_they_have(
    tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    records = read_records(tmp_path / name, "drawbench")
    assert [record["prompt"] for record in records] == ["A red, round car", 'Two "cats"']


def test_records_of_other_prompts_are_refused_by_number(tmp_path: Path) -> None:
    records = read_records(geneval_file(tmp_path), "geneval")
    check_records(records, [Prompt("a bench "), Prompt("a cow, “here”")])
    with pytest.raises(ValueError, match="expected 'a hat' in record 1, as data has it"):
        check_records(records, [Prompt("a bench"), Prompt("a hat")])
    with pytest.raises(ValueError, match="metadata: expected 1 records, one a prompt"):
        check_records(records, [Prompt("a bench")])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n', "metadata: expected tag in record 0 of .*, as GenEval's"),
        (
            "a.jsonl",
            '{"tag": "x", "include": []}\n',
            "metadata: expected one of prompt, .* 0",
        ),
        ("a.jsonl", "", "metadata: expected prompts in"),
        ("a.jsonl", "{", "metadata: expected .jsonl, .json, .csv or .tsv, got"),
        ("a.json", '{"prompt": "x"}', "metadata: expected records with keys, got others"),
    ],
)
def test_what_is_no_file_of_prompts_is_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / name, "geneval")
    with pytest.raises(FileNotFoundError, match="metadata: expected a file of prompts"):
        read_records(tmp_path / "none.jsonl", "geneval")
    with pytest.raises(ValueError, match="layout: expected geneval or drawbench, got 'dpg'"):
        read_records(tmp_path / name, "dpg")  # type: ignore[arg-type]
