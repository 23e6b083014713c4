"""What `argrpo sample` draws for, labels, class names or texts, and how the files are called."""

import difflib
from pathlib import Path
from typing import NamedTuple

import torch

from argrpo.class_names import class_names
from argrpo.data import Prompt, PromptSet, load_text_features
from argrpo.data_config import ClassNames
from argrpo.devices import choose_device
from argrpo.engine.conditions import Conditions
from argrpo.model_paths import blamed_on, resolve_path
from argrpo.models.text_layout import text_layout
from argrpo.progress import Report
from argrpo.prompt_files import PromptRow, read_rows
from argrpo.run_prompts import encode_texts
from argrpo.sample_config import SampleConfig


class Wanted(NamedTuple):
    """What images are drawn for."""

    conditions: Conditions  # of each image, those of one prompt in a row
    names: list[str]  # of the files of each prompt
    texts: list[str] | None  # of each prompt, where prompts are texts


def wanted_images(config: SampleConfig, report: Report) -> Wanted:
    """Conditions of all images; texts are encoded, if the cache lacks them.

    Raises:
        ValueError: no such class, a file without prompts, or a policy that reads no texts; named.
        FileNotFoundError: a file is missing.
    """
    repeats = config.num_images_per_prompt
    if config.labels is not None or config.names is not None:
        labels = config.labels
        if labels is None:
            labels = labels_of(config.names or [], config.names_from)
        repeated = torch.tensor(labels, dtype=torch.int64).repeat_interleave(repeats)
        return Wanted(repeated, [f"class_{label:04d}" for label in labels], None)
    prompts = _encoded(config, report)
    names = [f"prompt_{index:05d}" for index in range(len(prompts))]
    conditions = prompts.conditions(prompts.prompts, repeats)
    return Wanted(conditions, names, [prompt.text for prompt in prompts.prompts])


def labels_of(names: list[str], source: ClassNames) -> list[int]:
    """Class labels of class names, in order; case and spaces around them do not matter.

    Raises:
        ValueError: no class, or more than one, has a name; close ones are listed.
    """
    known = [name.casefold() for name in class_names(source)]
    return [_label_of(name, known, source) for name in names]


def _encoded(config: SampleConfig, report: Report) -> PromptSet:
    if config.text_features is not None:
        return load_text_features(Path(config.text_features), "text_features")
    with blamed_on("policy"):
        path = resolve_path(config.policy, config.cache_dir)
        layout = text_layout(path, text_padding=config.text_padding)
    if layout is None:
        given = "prompts" if config.prompts is not None else "prompts_file"
        raise ValueError(
            f"{given}: expected labels or names for {config.policy}, which reads no texts, got "
            f"{given}"
        )
    texts = config.prompts
    if texts is None:
        with blamed_on("prompts_file"):
            texts = [row.text for row in _rows(config)]
    encoded = encode_texts(
        texts,
        config.text_encoder,
        layout,
        device=choose_device(config.device),
        cache_dir=config.cache_dir,
        report=report,
    )
    return PromptSet([Prompt(text, prompt_id=row) for row, text in enumerate(texts)], encoded)


def _rows(config: SampleConfig) -> list[PromptRow]:
    source = str(resolve_path(str(config.prompts_file), config.cache_dir))
    return read_rows(source, column=config.prompt_column, split=config.prompt_split)


def _label_of(name: str, known: list[str], source: str) -> int:
    wanted = name.strip().casefold()
    found = [label for label, candidate in enumerate(known) if candidate == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        labels = ", ".join(map(str, found))
        raise ValueError(f"names: expected one class, got {name!r}, which labels {labels} share")
    close = difflib.get_close_matches(wanted, known, n=5, cutoff=0.5)
    close += [candidate for candidate in known if wanted and wanted in candidate][:5]
    hint = f"; close: {', '.join(dict.fromkeys(close))}" if close else ""
    raise ValueError(f"names: expected a class of {source}, got {name!r}{hint}")
