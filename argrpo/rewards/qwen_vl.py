"""Qwen2.5-VL as a judge, loaded here: a question about each image, asked in batches.

    probabilities   the answer's beginning is written for the model, `{"score": `, and the score is
                    the mean over the odds of the digit that follows: one forward pass, no answer
                    to generate, and images are told apart that would get the same digit
    answer          the model answers greedily, and the score is the number that it states; AR-GRPO
                    does so, and its rubric describes the image first

Images go to the processor as tensors on the device, floats in [0, 1]; nothing becomes a JPEG on the
way, as it does there. What cannot be read is NaN, never 0. The questions are files, see
rewards/vlm_questions.py. Judges of one folder share the model.

Any folder of transformers that holds a model of images and text with a chat template will do.

Shapes: N images, B of them at a time.

Source: Qwen2.5-VL, arXiv:2502.13923; Kwai-Klear/AR-GRPO at 65947ad, reward_utils/qwen_vl_reward.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.devices import DTYPES
from argrpo.model_paths import named_within
from argrpo.rewards.sharing import ImageMemo, Residence, SharedNetworks
from argrpo.rewards.vlm_questions import (
    Answer,
    Question,
    expected_score,
    load_question,
    read_score,
)

Reading = Literal["probabilities", "answer"]

_PUBLISHED = "Qwen/Qwen2.5-VL-3B-Instruct"


class QwenVlReward:
    """The score that the model gives, in the range of the question."""

    def __init__(
        self,
        folder: str = "Qwen2.5-VL-3B-Instruct",
        *,
        question: str = "rubric",
        read: str = "probabilities",
        max_new_tokens: int = 256,
        least_mass: float = 0.5,
        dtype: str = "bfloat16",
        device: torch.device,
        reward_batch: int = 8,
        offload: bool = False,
        shared: SharedNetworks | None = None,
        name: str | None = None,
    ) -> None:
        """Load the model.

        One argument for each option of the config, so more than is usual here.

        Args:
            folder: a Qwen2.5-VL of transformers with its processor.
            question: rubric, rubric_described, fake, weird, or a file of yours.
            read: probabilities or answer; see the top of this file.
            max_new_tokens: of an answer.
            least_mass: of the odds of all scores together, below which there is none.
            dtype: of the weights, float32 or bfloat16.
            device: where it runs.
            reward_batch: images asked about at a time; bounds memory.
            offload: keep the weights on the CPU between steps.
            shared: networks of other judges.
            name: under which its scores are logged; None: qwen_vl_ and the question.

        Raises:
            ValueError: an option is none of these, or the folder holds something else.
            FileNotFoundError: the folder, a file of it or the question is not there.
        """
        place = f"rewards.{name or 'qwen_vl'}.options"
        with named_within(place):
            asked = load_question(question)
            _check(read, asked, dtype, max_new_tokens)
        self.name = name or f"qwen_vl_{asked.name}"
        self.reward_batch = reward_batch
        self._question = asked
        self._reading = (read, max_new_tokens, least_mass)

        def load() -> _Model:
            with named_within(place):
                return _Model(folder, device, DTYPES[dtype], offload)

        key = (QwenVlReward, folder, dtype, device, offload)
        self._model = (shared or SharedNetworks()).once(key, load)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """[N, 3, H, W] in [0, 1] and N prompts -> [N] fp32, NaN = not scored."""
        asked = [self._question.about(prompt.text) for prompt in prompts]

        def score(missing: Tensor, rows: list[int]) -> Tensor:
            texts = [asked[row] for row in rows]
            parts = [
                self._score(part, texts[start : start + self.reward_batch])
                for start, part in zip(
                    range(0, len(texts), self.reward_batch),
                    missing.split(self.reward_batch),
                    strict=True,
                )
            ]
            return torch.cat(parts)

        key = (self._question, self._reading, self.reward_batch)
        return self._model.memo.rows(images, key, score, texts=asked)

    def rest(self) -> None:
        """Off the device until it is asked again, with the option offload."""
        self._model.residence.rest()

    def _score(self, images: Tensor, asked: list[str]) -> Tensor:
        """[B] fp32 on the CPU."""
        read, max_new_tokens, least_mass = self._reading
        if read == "probabilities":
            opening = f"{self._question.answer_opens} "
            odds = self._model.next_logprobs(images, asked, opening, self._question.digits)
            scores = [expected_score(each, self._question, least_mass) for each in odds]
        else:
            answers = self._model.answers(images, asked, max_new_tokens)
            scores = [read_score(answer, self._question) for answer in answers]
        return torch.tensor(scores, dtype=torch.float32)


class _Model:
    """The model and its processor, asked about images."""

    def __init__(
        self, folder: str, device: torch.device, dtype: torch.dtype, offload: bool
    ) -> None:
        self._model, self._processor = _load(folder, dtype)
        self.residence = Residence(self._model, device, offload=offload)
        self.memo = ImageMemo()
        self._device = device
        self._dtype = dtype

    def next_logprobs(
        self, images: Tensor, asked: list[str], opening: str, words: list[str]
    ) -> list[dict[str, float]]:
        """Log-probabilities of single words to go on with, where the answer begins with `opening`;
        of each image a dict by word, with and without a space in front."""
        inputs = self._inputs(images, asked, opening)
        logits = self._model(**inputs, logits_to_keep=1).logits[:, -1].float()
        tokens = self._tokens_of(words)
        chosen = torch.tensor(list(tokens.values()), device=logits.device)
        found = logits.log_softmax(dim=-1)[:, chosen].tolist()
        return [dict(zip(tokens, row, strict=True)) for row in found]

    def answers(self, images: Tensor, asked: list[str], max_new_tokens: int) -> list[Answer]:
        """Greedy answers."""
        from transformers import GenerationConfig

        inputs = self._inputs(images, asked, "")
        ends = self._model.generation_config.eos_token_id
        pad = self._processor.tokenizer.pad_token_id
        config = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad
        )
        written = self._model.generate(**inputs, generation_config=config)
        written = written[:, inputs["input_ids"].shape[1] :].tolist()
        stops = {pad, *(ends if isinstance(ends, list) else [ends])}
        texts = self._processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [
            Answer(text, is_whole=not stops.isdisjoint(tokens))
            for text, tokens in zip(texts, written, strict=True)
        ]

    def _inputs(self, images: Tensor, asked: list[str], opening: str) -> dict[str, Any]:
        self.residence.wake()
        texts = [self._conversation(question) + opening for question in asked]
        inputs = self._processor(
            images=list(images.to(self._device).float()),
            text=texts,
            do_rescale=False,  # pixels are in [0, 1] already
            padding=True,
            return_tensors="pt",
        ).to(self._device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self._dtype)
        return dict(inputs)

    def _conversation(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text: str = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return text

    def _tokens_of(self, words: list[str]) -> dict[str, int]:
        spelled = {
            form: self._processor.tokenizer.encode(form, add_special_tokens=False)
            for word in words
            for form in (word, f" {word}")
        }
        return {form: tokens[0] for form, tokens in spelled.items() if len(tokens) == 1}


def _load(folder: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(
            f"folder: expected a Qwen2.5-VL of transformers with its processor (published in "
            f"{_PUBLISHED}), got {folder} without config.json"
        )
    with _refused(folder):
        read: Any = AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
        )
        processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
    model, loaded = read
    # transformers fills what a file lacks with random numbers.
    if loaded["missing_keys"]:
        missing = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise ValueError(
            f"folder: expected all weights of the model, got {folder} without {missing}"
        )
    # The next token stands behind the last one of every row.
    processor.tokenizer.padding_side = "left"
    return model, processor


@contextmanager
def _refused(folder: str) -> Iterator[None]:
    """A library's complaint about the folder, as one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"folder: expected a model of images and text with its processor, as published in "
            f"{_PUBLISHED}, got {folder}: {reason[:300]}"
        ) from error


def _check(read: str, question: Question, dtype: str, max_new_tokens: int) -> None:
    if read not in get_args(Reading):
        raise ValueError(f"read: expected probabilities or answer, got {read!r}")
    if read == "probabilities" and question.answer_opens is None:
        raise ValueError(
            f"read: expected answer for the question {question.name}, which does not begin its "
            "answer with the score, got probabilities"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
