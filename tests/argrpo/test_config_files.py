"""Lists as people type them."""

from argrpo.config_files import TEXTS, parse_config
from argrpo.sample_config import SampleConfig

MODELS = ["--policy", "p", "--tokenizer", "t"]
LISTS = {"--labels": None, "--prompts": TEXTS}


def sample(*words: str) -> SampleConfig:
    return parse_config(SampleConfig, [*MODELS, *words], command="argrpo sample", lists=LISTS)


def test_words_of_a_list_of_texts_stay_as_they_are() -> None:
    words = ["7", "[a] red, fox", "null", "3.5", "a: b"]
    assert sample("--prompts", *words).prompts == words
    assert sample("--prompts=[a] fox", "--seed", "3").prompts == ["[a] fox"]


def test_words_of_another_list_are_what_they_look_like() -> None:
    assert sample("--labels", "207", "360").labels == [207, 360]
    assert sample("--labels=[207,360]").labels == [207, 360]
