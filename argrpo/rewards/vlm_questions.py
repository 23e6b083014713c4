"""What a vision-language model is asked about an image, and the score that its answer holds.

A question is a text file: a head of `key: value` lines, an empty line, and the words of the
question, in which {prompt} stands for the text that the image was drawn for.

    lowest, highest   the scores that an answer may give
    before_score      what an answer writes before the score, spaces aside
    answer_opens      how an answer begins, up to the score, where that is the first thing it says
                      and a whole number of one digit. Then the odds of the digits are worth more
                      than the digit chosen: the score is their mean. Leave it out where answers
                      reason first or give fractions.

Those of this package stand in rewards/questions/ and are asked for by name, yours by path. The
points of the rubric and what `fake` and `weird` ask are those of AR-GRPO's three judges, and so is
the layout of `rubric_described`, which reasons before it scores as theirs do; the words are ours.
What `unified_reward` asks follows CodeGoat24/UnifiedReward, whose models were trained on its form.

Source: Kwai-Klear/AR-GRPO at 65947ad, reward_utils/qwen_vl_prompts.txt and unireward.py.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).parent / "questions"
_PLACE = "{prompt}"
_NEEDED, _KNOWN = {"lowest", "highest", "before_score"}, {"answer_opens"}
# A digit, "/" or "%" behind a number makes it another number: 3.55, 3/5 and 30% are not 3.5, 3, 30.
_NUMBER = r"(-?\d+(?:\.\d+)?)(?!\d|\.\d|\s*[/%])"


@dataclass(frozen=True, slots=True)
class Question:
    """One question and how its answers are read."""

    name: str
    """Of its file."""
    words: str
    """With {prompt} where the text of an image goes, or without."""
    lowest: float
    highest: float
    before_score: str
    answer_opens: str | None = None

    def about(self, text: str) -> str:
        """The question about an image that was drawn for `text`."""
        return self.words.replace(_PLACE, text)

    @property
    def digits(self) -> list[str]:
        """The scores whose odds may be read, as they are written."""
        return [str(score) for score in range(int(self.lowest), int(self.highest) + 1)]


class TokenOdds(NamedTuple):
    """One token of an answer, and what else might have stood there."""

    text: str
    logprobs: Mapping[str, float]  # natural log-probabilities by the text of a token


class Answer(NamedTuple):
    """What a model said."""

    text: str
    is_whole: bool = True  # False: cut off at the most tokens that it may say
    tokens: Sequence[TokenOdds] | None = None  # None: no log-probabilities are known


def load_question(source: str) -> Question:
    """A question of this package by name, or of yours by the path of its file.

    Raises:
        ValueError: the file is not laid out as the top of vlm_questions.py says.
        FileNotFoundError: there is neither.
    """
    path = _FOLDER / f"{source}.txt" if _is_name(source) else Path(source)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.txt")))
        raise FileNotFoundError(f"question: expected one of {names}, or a file, got {source}")
    head, gap, words = path.read_text(encoding="utf-8").partition("\n\n")
    said = dict(line.split(":", 1) for line in head.splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in said.items()}
    wrong = (_NEEDED - values.keys()) or (values.keys() - _NEEDED - _KNOWN)
    if wrong or not gap or not words.strip():
        raise ValueError(
            f"question: expected {', '.join(sorted(_NEEDED | _KNOWN))}, an empty line and a "
            f"question, got {path} with {', '.join(sorted(wrong)) or 'no question'} amiss"
        )
    lowest, highest = _range_of(values, path)
    return Question(
        path.stem,
        words.strip(),
        lowest,
        highest,
        values["before_score"],
        values.get("answer_opens"),
    )


def read_score(answer: Answer, question: Question, *, least_mass: float = 0.5) -> float:
    """The score that an answer gives: the mean by its tokens' odds where they are known and the
    question allows it, else the number it says. NaN where it gives none.

    Args:
        answer: of the model.
        question: that was asked.
        least_mass: an answer is none unless the odds of the allowed scores add up to this.
    """
    said = stated_score(answer.text, question, is_whole=answer.is_whole)
    if answer.tokens is None or question.answer_opens is None:
        return said
    # One that gives a fraction all the same is taken at its word: its first digit is not all of it.
    if not said.is_integer():
        return said
    at = _score_token([token.text for token in answer.tokens], question)
    return said if at is None else expected_score(answer.tokens[at].logprobs, question, least_mass)


def stated_score(text: str, question: Question, *, is_whole: bool = True) -> float:
    """The number behind `before_score`; NaN where there is none, or two that differ, or it is out
    of range, or its end was cut off."""
    matches = list(_pattern(question).finditer(text))
    scores = {float(match[1]) for match in matches}
    if len(scores) != 1:
        return math.nan
    # Behind the cut, 3 or "3." might have gone on to 3.5.
    if not is_whole and text[matches[-1].end() :].strip() in ("", "."):
        return math.nan
    (score,) = scores
    return score if question.lowest <= score <= question.highest else math.nan


def expected_score(
    logprobs: Mapping[str, float], question: Question, least_mass: float = 0.5
) -> float:
    """The mean score by the odds of each.

    Args:
        logprobs: natural log-probabilities by the text of a token, spaces around it allowed.
        question: says which scores there are.
        least_mass: NaN where the odds of all scores add up to less.
    """
    odds = dict.fromkeys(question.digits, 0.0)
    for token, logprob in logprobs.items():
        if token.strip() in odds:
            odds[token.strip()] += math.exp(logprob)
    mass = sum(odds.values())
    # Also where a log-probability is NaN, or no score is among the tokens.
    if not mass >= max(least_mass, 1e-12):
        return math.nan
    return sum(float(score) * probability for score, probability in odds.items()) / mass


def _is_name(source: str) -> bool:
    return re.fullmatch(r"\w+", source) is not None


def _range_of(values: Mapping[str, str], path: Path) -> tuple[float, float]:
    try:
        lowest, highest = float(values["lowest"]), float(values["highest"])
    except ValueError as error:
        raise ValueError(f"question: expected numbers in {path}: {error}") from error
    if not lowest < highest:
        raise ValueError(f"question: expected lowest below highest, got {lowest}, {highest}")
    one_digit = lowest.is_integer() and highest.is_integer() and lowest >= 0 and highest <= 9
    if "answer_opens" in values and not one_digit:
        raise ValueError(
            f"question: expected scores of one digit with answer_opens, got {lowest} to {highest}"
        )
    return lowest, highest


def _pattern(question: Question) -> re.Pattern[str]:
    """The score in an answer, whatever spaces it puts between words and signs."""
    pieces = re.findall(r"\w+|[^\w\s]", question.before_score)
    # JSON writers put numbers into quotes, and chatty ones into bold type.
    return re.compile(r"\s*".join(map(re.escape, pieces)) + r'[\s"*]*' + _NUMBER)


def _score_token(tokens: Sequence[str], question: Question) -> int | None:
    """Which token holds the score."""
    match = _pattern(question).search("".join(tokens))
    if match is None:
        return None
    end = 0
    for index, token in enumerate(tokens):
        end += len(token)
        if end > match.start(1):
            return index
    return None
