"""Every setting says what it does: the docstring under a field is the help of its flag."""

import ast
import dataclasses
import inspect
import textwrap
from typing import get_args, get_type_hints

import pytest

from argrpo.config import TrainConfig
from argrpo.demo import DemoConfig
from argrpo.sampling import SampleConfig


def records_of(kind: type) -> set[type]:
    """A config and the configs inside it."""
    found = {kind}
    for hint in get_type_hints(kind).values():
        for inner in (hint, *get_args(hint)):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                found |= records_of(inner)
    return found


def undocumented(kind: type) -> list[str]:
    """Fields that no string follows."""
    (record,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(record, ast.ClassDef)
    return [
        ast.unparse(line.target)
        for line, following in zip(record.body, [*record.body[1:], None], strict=True)
        if isinstance(line, ast.AnnAssign)
        and not (isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant))
    ]


@pytest.mark.parametrize("kind", [TrainConfig, SampleConfig, DemoConfig])
def test_every_setting_has_a_line_of_help(kind: type) -> None:
    assert {record.__name__: undocumented(record) for record in records_of(kind)} == {
        record.__name__: [] for record in records_of(kind)
    }


def test_the_settings_of_a_run_reach_into_every_record() -> None:
    names = {record.__name__ for record in records_of(TrainConfig)}
    assert names > {"RewardConfig", "LearningRateConfig", "SamplingParams", "ObjectiveConfig"}
