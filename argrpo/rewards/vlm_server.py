"""Vision-language models as judges, behind any server that speaks OpenAI's chat completions.

One request an image: the picture as PNG, and a question of rewards/vlm_questions.py. Temperature 0;
log-probs are asked for, and where the server gives them and the question allows it, the score is
the mean over the odds of its digits, which tells images apart that get the same digit. Elsewhere it
is the number that the answer states. An answer without one is not scored.

vLLM and SGLang serve Qwen2.5-VL and UnifiedReward in this way.

Source: Qwen2.5-VL, arXiv:2502.13923; UnifiedReward, arXiv:2503.05236; what is asked is compared
with AR-GRPO's in vlm_questions.py.
"""

import asyncio
import math
from collections.abc import Mapping
from copy import copy
from typing import Any, Self

import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.rewards import vlm_questions
from argrpo.rewards.delivery import Delivery
from argrpo.rewards.image_transfer import pil_images
from argrpo.rewards.json_client import Connection, JsonClient, RequestError
from argrpo.rewards.protocols import Answer
from argrpo.rewards.vlm_questions import TokenOdds, load_question, read_score

_TOP_LOGPROBS = 20  # the most that OpenAI's interface gives; ten digits fit with room for spaces
_SHORT_ANSWER, _LONG_ANSWER = 32, 1024  # tokens


class VlmServerReward:
    """A question to a model behind a server, in the question's own range of scores."""

    reward_batch = 1

    def __init__(
        self,
        url: str,
        model: str,
        *,
        question: str = "rubric",
        logprobs: bool = True,
        max_tokens: int | None = None,
        image_size: int | None = None,
        request: Mapping[str, Any] | None = None,
        connection: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        """Connects to nothing yet. One argument an option of the config, so more than usual.

        Args:
            url: of the interface, as http://127.0.0.1:8000/v1.
            model: by the name that the server knows it by.
            question: rubric, rubric_described, fake, weird, unified_reward, or a file.
            logprobs: ask for the odds of tokens; False for servers that refuse to be asked.
            max_tokens: of an answer; None: 32 where the score comes first, else 1024.
            image_size: pixels a side to which pictures are resized before they are sent.
            request: what else goes into each request, as {"top_k": 1}.
            connection: timeout_s, max_retries, backoff_s, max_connections, api_key_file.
            name: under which its scores are logged; None: vlm_QUESTION.

        Raises:
            ValueError: an option is out of range, or the question cannot be read, named.
            FileNotFoundError: there is no such question, or no key.
        """
        self._question = load_question(question)
        self.name = name or f"vlm_{self._question.name}"
        place = f"rewards.{self.name}.options"
        for key, value in (("max_tokens", max_tokens), ("image_size", image_size)):
            if value is not None and value < 1:
                raise ValueError(f"{place}.{key}: expected at least 1, got {value}")
        opens = self._question.answer_opens is not None
        self._image_size = image_size
        self._request = {
            "model": model,
            "temperature": 0,
            "max_tokens": max_tokens or (_SHORT_ANSWER if opens else _LONG_ANSWER),
            **({"logprobs": True, "top_logprobs": _TOP_LOGPROBS} if logprobs and opens else {}),
            **(request or {}),
        }
        wanted = Connection.of(connection, f"{place}.connection")
        self._client = JsonClient(f"{url.rstrip('/')}/chat/completions", wanted, place=place)
        self._delivery = Delivery()

    def within(self, delivery: Delivery) -> Self:
        """This judge, on the same connections, for the questions of a step."""
        bound = copy(self)
        bound._delivery = delivery
        return bound

    async def ask(self, images: Tensor, prompts: list[Prompt]) -> Answer:
        """One request an image."""
        pairs = zip(images.split(1), prompts, strict=True)
        return Answer.joined(await asyncio.gather(*(self._ask(*pair) for pair in pairs)))

    async def close(self) -> None:
        """Let go of open connections."""
        await self._client.close()

    async def _ask(self, image: Tensor, prompt: Prompt) -> Answer:
        picture = await asyncio.to_thread(self._picture, image)
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
            {"type": "text", "text": self._question.about(prompt.text)},
        ]
        body = {**self._request, "messages": [{"role": "user", "content": content}]}
        num_retries = 0
        try:
            reply = await self._client.post(body, self._delivery.due)
            num_retries = reply.num_retries
            said = read_completion(reply.value)
        except RequestError as error:
            return Answer.none(1, str(error), num_retries or error.num_retries)
        score = read_score(said, self._question)
        if math.isnan(score):
            return Answer.none(1, f"no score in the answer {said.text[:200]!r}", num_retries)
        return Answer(torch.tensor([score]), 0, num_retries)

    def _picture(self, image: Tensor) -> str:
        (picture,) = pil_images(image)
        return self._delivery.pngs.of(picture, self._image_size)


class QwenVlServer(VlmServerReward):
    """`qwen_vl` of rewards/qwen_vl.py, answered by a server: the same questions and names."""

    def __init__(
        self,
        url: str,
        *,
        model: str = "Qwen/Qwen2.5-VL-3B-Instruct",
        question: str = "rubric",
        read: str = "probabilities",
        max_new_tokens: int | None = None,
        connection: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        """Connects to nothing yet.

        Args:
            url: of the interface, as http://127.0.0.1:8000/v1.
            model: by the name that the server knows it by.
            question: rubric, rubric_described, fake, weird, or a file.
            read: probabilities, the odds of the digit where the server gives them; or answer, the
                number that is stated.
            max_new_tokens: of an answer; None: 32 where the score comes first, else 1024.
            connection: as of `VlmServerReward`.
            name: under which its scores are logged; None: qwen_vl_ and the question.

        Raises:
            ValueError: an option is none of these.
            FileNotFoundError: there is no such question, or no key.
        """
        if read not in ("probabilities", "answer"):
            raise ValueError(
                f"rewards.{name or 'qwen_vl'}.options.read: expected probabilities or answer, got "
                f"{read!r}"
            )
        super().__init__(
            url,
            model,
            question=question,
            logprobs=read == "probabilities",
            max_tokens=max_new_tokens,
            connection=connection,
            name=name or f"qwen_vl_{load_question(question).name}",
        )


class UnifiedRewardServer(VlmServerReward):
    """UnifiedReward's models: alignment and quality together, 1 to 5."""

    def __init__(
        self,
        url: str,
        model: str = "UnifiedReward-7b-v1.5",
        *,
        max_tokens: int | None = None,
        image_size: int | None = 512,
        connection: Mapping[str, Any] | None = None,
        name: str = "unified_reward",
    ) -> None:
        """Arguments as of `VlmServerReward`."""
        super().__init__(
            url,
            model,
            question="unified_reward",
            max_tokens=max_tokens,
            image_size=image_size,
            connection=connection,
            name=name,
        )


def read_completion(value: Any) -> vlm_questions.Answer:
    """The first choice of a chat completion.

    Raises:
        RequestError: there is none, or it has no text.
    """
    try:
        choice = value["choices"][0]
        text = choice["message"]["content"]
        if not isinstance(text, str):
            raise TypeError("content is no text")
        return vlm_questions.Answer(text, choice.get("finish_reason") != "length", _tokens(choice))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        problem = f"expected a chat completion, got {str(value)[:200]} ({error!r})"
        raise RequestError(problem) from error


def _tokens(choice: Mapping[str, Any]) -> list[TokenOdds] | None:
    """The answer's tokens and their odds; None where the server gave none."""
    said = (choice.get("logprobs") or {}).get("content")
    if not said:
        return None
    return [
        TokenOdds(
            _text_of(token),
            # The token itself may lie below the most likely ones that are listed.
            {
                _text_of(each): _logprob_of(each)
                for each in (token, *(token.get("top_logprobs") or []))
            },
        )
        for token in said
    ]


def _text_of(token: Mapping[str, Any]) -> str:
    text = token["token"]
    if not isinstance(text, str):
        raise TypeError("a token is no text")
    return text


def _logprob_of(token: Mapping[str, Any]) -> float:
    logprob = float(token["logprob"])
    # A hundredth, for servers that round.
    if not logprob <= 0.01:
        raise ValueError(f"log-probability {logprob:g}")
    return logprob
