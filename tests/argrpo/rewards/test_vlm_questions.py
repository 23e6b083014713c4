"""Questions to vision-language models, and reading their answers."""

import math

import pytest

from argrpo.rewards.vlm_questions import (
    Answer,
    TokenOdds,
    expected_score,
    load_question,
    read_score,
    stated_score,
)

_RUBRIC = load_question("rubric")
_DESCRIBED = load_question("rubric_described")
_UNIFIED = load_question("unified_reward")


@pytest.mark.parametrize(
    ("name", "lowest", "highest", "asks_about_text"),
    [
        ("rubric", 0, 5, True),
        ("rubric_described", 0, 5, True),
        ("fake", 0, 1, False),
        ("weird", 0, 1, False),
        ("unified_reward", 1, 5, True),
    ],
)
def test_the_questions_of_the_package(name, lowest, highest, asks_about_text) -> None:
    question = load_question(name)
    assert (question.lowest, question.highest) == (lowest, highest)
    asked = question.about("a {red} hat")
    assert ("a {red} hat" in asked) == asks_about_text
    assert "{prompt}" not in asked


@pytest.mark.parametrize("name", ["rubric", "rubric_described", "fake", "weird"])
def test_a_question_shows_an_answer_that_can_be_read(name: str) -> None:
    question = load_question(name)
    assert not math.isnan(stated_score(question.words, question))


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"score": 4}', 4.0),
        ('```json\n{ "score" : 3.5 }\n```', 3.5),
        ('{"score": "2"}', 2.0),
        ('{"score": 2,}', 2.0),  # a comma too many: no JSON, but it says what it says
        ('{"score": 0}', 0.0),
        ('Sure! {"score": 5} is what I think.', 5.0),
        ('{"score": 2} or rather {"score": 2.0}', 2.0),
        ('{"score": 2} or rather {"score": 3}', None),
        ('{"score": 6}', None),
        ('{"score": -1}', None),
        ('{"score": 3/5}', None),
        ('{"score": 60%}', None),
        ('{"score": null}', None),
        ('{"score": NaN}', None),
        ('{"sco', None),
        ("I like it: 4", None),
        ("", None),
    ],
)
def test_a_stated_score_is_read_or_missing_but_never_made_up(text: str, score: float) -> None:
    read = stated_score(text, _RUBRIC)
    assert math.isnan(read) if score is None else read == score


def test_a_number_that_may_go_on_behind_the_cut_is_no_score() -> None:
    for cut in ('{"score": 3', '{"score": 3.', '{"score": 3.5'):
        assert math.isnan(stated_score(cut, _DESCRIBED, is_whole=False))
    assert stated_score('{"score": 3, "explana', _DESCRIBED, is_whole=False) == 3.0
    assert stated_score("Final Score: 3", _UNIFIED) == 3.0


@pytest.mark.parametrize(
    ("text", "score"),
    [("Final Score: 4", 4.0), ("**Final Score:** 3.5.", 3.5), ("Final Score: 0.5", None)],
)
def test_the_form_of_unified_reward(text: str, score: float) -> None:
    read = stated_score(text, _UNIFIED)
    assert math.isnan(read) if score is None else read == score


def test_the_odds_of_the_scores_give_their_mean() -> None:
    logprobs = {"3": math.log(0.3), " 3": math.log(0.1), "5": math.log(0.4), "x": math.log(0.2)}
    # 3 and 5 are equally likely once x is left out.
    assert expected_score(logprobs, _RUBRIC) == pytest.approx(4.0, abs=1e-12)


def test_odds_that_mostly_say_something_else_are_no_score() -> None:
    logprobs = {"3": math.log(0.3), "The": math.log(0.7)}
    assert math.isnan(expected_score(logprobs, _RUBRIC))
    assert expected_score(logprobs, _RUBRIC, least_mass=0.2) == pytest.approx(3.0)
    assert math.isnan(expected_score({"The": 0.0}, _RUBRIC, least_mass=0.0))
    assert math.isnan(expected_score({"3": math.nan}, _RUBRIC))


def _answer(*pieces: str, odds: dict[str, float], **more: object) -> Answer:
    """Tokens of which that of the first digit has these odds."""
    tokens = [TokenOdds(p, odds if p.strip().isdigit() else {p: 0.0}) for p in pieces]
    return Answer("".join(pieces), tokens=tokens, **more)


def test_the_odds_count_where_the_score_stands() -> None:
    odds = {"4": math.log(0.5), "2": math.log(0.5)}
    answer = _answer('{"', "score", '":', " ", "4", "}", odds=odds)
    assert read_score(answer, _RUBRIC) == pytest.approx(3.0)
    # Where they do not lead to a score, the answer is none, whatever it says.
    assert math.isnan(read_score(_answer('{"score": ', "4", "}", odds={"4": -9.0}), _RUBRIC))


def test_without_odds_the_answer_is_taken_at_its_word() -> None:
    assert read_score(Answer('{"score": 4}'), _RUBRIC) == 4.0


def test_odds_of_a_first_digit_say_nothing_about_a_fraction() -> None:
    odds = {"4": math.log(0.5), "2": math.log(0.5)}
    assert read_score(_answer('{"score": ', "4", ".5", "}", odds=odds), _RUBRIC) == 4.5
    assert read_score(_answer('{"score": ', "4", "}", odds=odds), _DESCRIBED) == 4.0


def test_a_file_of_your_own_is_a_question(tmp_path) -> None:
    path = tmp_path / "hats.txt"
    path.write_text("lowest: 1\nhighest: 9\nbefore_score: Hats:\n\nHow many hats on {prompt}?\n")
    question = load_question(str(path))
    assert (question.name, question.about("a cat")) == ("hats", "How many hats on a cat?")
    assert stated_score("Hats: 7", question) == 7.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lowest: 0\nhighest: 1\n\nWell?", "with before_score amiss"),
        ("lowest: 0\nhighest: 1\nbefore_score: S\nlow: 2\n\nWell?", "with low amiss"),
        ("lowest: 0\nhighest: 1\nbefore_score: S", "with no question amiss"),
        ("lowest: a\nhighest: 1\nbefore_score: S\n\nWell?", "expected numbers"),
        ("lowest: 1\nhighest: 1\nbefore_score: S\n\nWell?", "expected lowest below highest"),
        (
            "lowest: 0\nhighest: 10\nbefore_score: S\nanswer_opens: S\n\nWell?",
            "scores of one digit with answer_opens",
        ),
    ],
)
def test_a_file_that_is_no_question_is_named(tmp_path, content: str, message: str) -> None:
    path = tmp_path / "q.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"question: .*{message}"):
        load_question(str(path))


def test_a_question_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(FileNotFoundError, match=r"expected one of fake, rubric, .*got rubrik"):
        load_question("rubrik")
