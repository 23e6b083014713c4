"""`argrpo eval` says where its results are, and refuses a folder that it cannot write."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from argrpo.cli import main
from argrpo.eval_c2i import C2iResults
from argrpo.evaluation_tables import tell_c2i


def test_the_end_of_what_is_printed_says_where_all_is() -> None:
    settings = {"num_images": 40, "classes": "balanced", "seed": 0, "temperature": 1.0, "top_k": 0}
    settings |= {"top_p": 1.0, "pixels": "llamagen", "batch": 8, "reference": "r.npz"}
    row = {"policy": "x", "guidance_scale": 2.0, "frechet": 3.0}
    results = C2iResults({**settings, "best_by": "frechet"}, [row], {"x": row})
    out = io.StringIO()
    tell_c2i(results, Path("evaluation"), Console(file=out, width=160))
    *_, best, where, record = out.getvalue().splitlines()
    assert best == "x: best frechet 3 at guidance 2"
    assert where == "evaluation: results.json; images in POLICY/guidance_SCALE/samples.npz"
    assert json.loads(record)["rows"] == [row]


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    (tmp_path / "file").write_text("kept")
    words = ["eval", kind, "--policy", "missing.pt", "--tokenizer", "missing.pt"]
    if kind == "c2i":
        words += ["--features", "digits_judge", "--features_path", "j", "--reference", "r.npz"]
    else:
        (tmp_path / "p.json").write_text('["a fox"]')
        words += ["--metadata", str(tmp_path / "p.json"), "--layout", "drawbench"]
    assert main([*words, "--output_dir", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("argrpo: output_dir: expected a folder, got ")
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    assert "expected a folder, got" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
