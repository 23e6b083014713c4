"""Prompts of every kind of source, and what becomes of odd rows."""

import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from argrpo.prompt_files import PromptRow, read_rows


def texts(source: Path | str, **options: str) -> list[str]:
    return [row.text for row in read_rows(str(source), **options)]


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8", newline="")
    return path


def test_ar_grpos_conversations(tmp_path: Path) -> None:
    rows = [
        {"id": "coco_1", "conversations": [{"from": "human", "value": text}, {"value": ""}]}
        for text in ("a dog", "two cats, asleep")
    ]
    assert texts(write(tmp_path / "p.json", json.dumps(rows))) == ["a dog", "two cats, asleep"]


def test_coco_captions(tmp_path: Path) -> None:
    record = {
        "images": [{"id": 1}],
        "annotations": [{"image_id": 1, "id": 5, "caption": "A bicycle replica."}],
    }
    assert texts(write(tmp_path / "captions.json", json.dumps(record))) == ["A bicycle replica."]


def test_a_list_of_strings_and_one_of_objects(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.json", '["a dog", "a cat"]')) == ["a dog", "a cat"]
    rows = '[{"prompt": "a dog", "text": "no"}, {"prompt": "a cat"}]'
    assert texts(write(tmp_path / "b.json", rows)) == ["a dog", "a cat"]


def test_a_reference_image_is_a_path_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    picture = write(tmp_path / "pictures" / "a.png", "")
    lines = '{"text": "a", "reference_image": "pictures/a.png"}\n{"text": "b"}\n'
    rows = read_rows(str(write(tmp_path / "p.jsonl", lines)))
    assert [row.reference_image for row in rows] == [picture, None]
    table = write(tmp_path / "p.csv", "text,reference_image\na,pictures/a.png\nb,\n")
    assert [row.reference_image for row in read_rows(str(table))] == [picture, None]
    missing = write(tmp_path / "q.jsonl", '"b"\n{"text": "a", "reference_image": "b.png"}\n')
    with pytest.raises(FileNotFoundError, match=r"row 1: reference_image: expected a picture, got"):
        read_rows(str(missing))
    other = write(tmp_path / "r.json", '[{"text": "a", "reference_image": [1]}]')
    with pytest.raises(ValueError, match="row 0: reference_image: expected the path of a picture"):
        read_rows(str(other))


def test_jsonl_keeps_class_ids_and_takes_strings(tmp_path: Path) -> None:
    lines = '{"text": "a seven", "class_id": 7}\n"a dog"\n{"caption": "x", "class_id": null}\n'
    assert read_rows(str(write(tmp_path / "p.jsonl", lines))) == [
        PromptRow("a seven", 7),
        PromptRow("a dog"),
        PromptRow("x"),
    ]


def test_parti_prompts_with_a_quote_in_a_field(tmp_path: Path) -> None:
    content = (
        "Prompt\tCategory\tChallenge\tNote\r\n"
        'bond\tAbstract\tBasic\t"a ""note"""\r\n'
        '"G I G G L E" painted in thick, colorful lettering\tIllustrations\tWriting\r\n'
    )
    path = write(tmp_path / "PartiPrompts.tsv", content)
    assert texts(path) == ["bond", '"G I G G L E" painted in thick, colorful lettering']
    assert texts(path, column="note")[0] == 'a "note"'


def test_a_csv_file_has_quotes_where_its_texts_have_commas(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", 'id,caption,class_id\n1,"a dog, asleep",3\n2,a cat,\n')
    assert read_rows(str(path)) == [PromptRow("a dog, asleep", 3), PromptRow("a cat")]
    broken = write(tmp_path / "q.csv", "id,caption\n1,a dog, asleep\n")
    with pytest.raises(ValueError, match=r"row 0: expected 2 fields, got more; put a text"):
        read_rows(str(broken))
    unclosed = write(tmp_path / "r.csv", 'id,caption\n1,"a dog\n')
    with pytest.raises(ValueError, match="with matching quotes"):
        read_rows(str(unclosed))


def test_commas_belong_to_the_text_of_a_csv_file_with_one_column(tmp_path: Path) -> None:
    # LlamaGen's caption file has such rows.
    path = write(tmp_path / "p.csv", 'Prompt\nThree men, sitting,\n"Head shot" of a zebra.\n"a, b"')
    assert texts(path) == ["Three men, sitting,", '"Head shot" of a zebra.', "a, b"]


def test_plain_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    # Neither a form feed nor Unicode's line separator ends a prompt.
    path = write(tmp_path / "p.txt", "a dog\r\na\x0ccat\u2028asleep\nlast")
    assert texts(path) == ["a dog", "a\x0ccat\u2028asleep", "last"]


def test_data_sets_from_a_folder(tmp_path: Path) -> None:
    rows = {"caption": ["a dog", "ünï 猫"], "class_id": [1, 2], "other": [0.5, 0.25]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "one")
    expected = [PromptRow("a dog", 1), PromptRow("ünï 猫", 2)]
    assert read_rows(str(tmp_path / "one")) == expected
    DatasetDict({"test": Dataset.from_dict(rows)}).save_to_disk(tmp_path / "splits")
    assert read_rows(str(tmp_path / "splits"), split="test") == expected
    with pytest.raises(ValueError, match="expected a data set with a split train"):
        read_rows(str(tmp_path / "splits"))
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", '{"text": "a hat"}\n')
    assert texts(tmp_path / "files") == ["a hat"]


def test_a_hub_name_that_cannot_be_had_is_one_clear_line() -> None:
    # The tests run offline, as many machines do.
    with pytest.raises(ValueError, match="hub:no/such: expected a data set with a split train"):
        read_rows("hub:no/such")
    with pytest.raises(ValueError, match="expected hub:NAME, as hub:me/prompts, got hub: without"):
        read_rows("hub:")


def test_text_stays_as_it_is_and_twice_the_same_are_two(tmp_path: Path) -> None:
    odd = ["ünïcödé 猫 🐱", "  spaces stay ", "a dog", "a dog", "x" * 100_000, "\ud83d half"]
    assert texts(write(tmp_path / "p.json", json.dumps(odd))) == odd


def test_empty_rows_are_left_out_and_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "p.jsonl", '{"text": "a"}\n{"text": ""}\n{"text": null}\n\n" "\n"b"')
    with caplog.at_level(logging.WARNING):
        assert texts(path) == ["a", "b"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: left out 4 rows without text"
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", "[1]", "row 0: expected a text or an object, got int"),
        ("p.json", '{"a": 1}', "expected a list, or COCO's object with annotations, got dict"),
        ("p.json", "[", "expected JSON"),
        ("p.json", '["a", {"title": "b"}]', "row 1: expected a column prompt or text or caption"),
        ("p.json", '[{"conversations": []}]', "row 0: conversations: expected a first turn"),
        ("p.json", '[{"text": 3}]', "row 0: text: expected a text, got 3"),
        ("p.jsonl", '"a"\n{', r"row 1: expected JSON, got '\{'"),
        ("p.jsonl", '{"text": "a", "class_id": "x"}', "row 0: class_id: expected an integer"),
        ("p.tsv", "Prompt\na\tb", "row 0: expected 1 fields, got 2"),
        ("p.tsv", "Prompt", "expected prompts, got 0 rows"),
        ("p.txt", "\n \n", "expected prompts, got 2 rows and no text in them"),
        ("p.parquet", "", "expected one of .json, .jsonl, .csv, .tsv, .txt, got '.parquet'"),
    ],
)
def test_what_cannot_be_a_prompt_is_refused_by_its_row(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_rows(str(write(tmp_path / name, content)))


def test_another_encoding_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match="expected UTF-8, got something else at byte 2"):
        read_rows(str(path))
    with pytest.raises(FileNotFoundError, match="expected a file, a folder or hub:NAME, got"):
        read_rows(str(tmp_path / "none.txt"))


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes("prompt,id\na dog,1\n".encode("utf-8-sig"))
    assert texts(tmp_path / "p.csv") == ["a dog"]
