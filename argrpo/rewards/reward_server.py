"""Judges that cannot live in this environment: they answer over HTTP, JSON in and out.

    POST URL   {"images": [PNG in base64, ...], "prompts": [text, ...], "metadata": [..., ...]}
    200        {"scores": [number or null, ...]}

One score an image, in order; null is not scored. `metadata` is there only where the judge has a
file of it. Floats become 8 bits by rounding. Other codes than 200 mean what they mean in HTTP, and
the client reads nothing of them but Retry-After. serving.py is the other side of this.

What a server fails to give is NaN here: a wrong number of scores, a number out of the judge's
range, text instead of JSON. No answer is ever made up, and none is read as anything but JSON.

Sources of what is served: DeQA-Score, arXiv:2501.11561; GenEval, arXiv:2310.11513; ImageReward,
arXiv:2304.05977.
"""

import asyncio
import json
import math
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.rewards.delivery import Delivery
from argrpo.rewards.image_transfer import pil_images
from argrpo.rewards.json_client import Connection, JsonClient, RequestError
from argrpo.rewards.protocols import Answer


class ServerReward:
    """Any judge behind a server of the protocol above."""

    def __init__(
        self,
        url: str,
        *,
        low: float | None = None,
        high: float | None = None,
        metadata: str | None = None,
        connection: Mapping[str, Any] | None = None,
        reward_batch: int = 8,
        name: str = "server",
    ) -> None:
        """Connects to nothing yet.

        Args:
            url: where to post.
            low: no score is below it; None: no bound.
            high: no score is above it.
            metadata: a file with a JSON object a line, whose key "prompt" is the text of a prompt;
                it goes with the images of that prompt. An image without one is not scored.
            connection: timeout_s, max_retries, backoff_s, max_connections, api_key_file.
            reward_batch: images of a request.
            name: under which its scores are logged.

        Raises:
            ValueError: an option is out of range, named.
            FileNotFoundError: a file is not there.
        """
        place = f"rewards.{name}.options"
        if reward_batch < 1:
            raise ValueError(f"{place}.reward_batch: expected at least 1, got {reward_batch}")
        if low is not None and high is not None and not low < high:
            raise ValueError(f"{place}.low: expected less than high {high}, got {low}")
        self.name = name
        self.reward_batch = reward_batch
        self._low = -math.inf if low is None else low
        self._high = math.inf if high is None else high
        self._metadata = None if metadata is None else _read_metadata(metadata, place)
        wanted = Connection.of(connection, f"{place}.connection")
        self._client = JsonClient(url, wanted, place=place)
        self._delivery = Delivery()

    def within(self, delivery: Delivery) -> Self:
        """This judge, on the same connections, for the questions of a step."""
        bound = copy(self)
        bound._delivery = delivery
        return bound

    async def ask(self, images: Tensor, prompts: list[Prompt]) -> Answer:
        """One request."""
        body: dict[str, Any] = {"prompts": [prompt.text for prompt in prompts]}
        if self._metadata is not None:
            found = [self._metadata.get(prompt.text) for prompt in prompts]
            if None in found:
                text = prompts[found.index(None)].text
                return Answer.none(len(prompts), f"no metadata for the prompt {text!r}")
            body["metadata"] = found
        # In a thread: squeezing pictures would hold up the other requests of the loop.
        body["images"] = await asyncio.to_thread(self._texts, images)
        num_retries = 0
        try:
            reply = await self._client.post(body, self._delivery.due)
            num_retries = reply.num_retries
            scores = read_scores(reply.value, len(prompts), self._low, self._high)
        except RequestError as error:
            return Answer.none(len(prompts), str(error), num_retries or error.num_retries)
        failures = int(scores.isnan().sum())
        problem = None
        if failures:
            bounds = f"[{self._low:g}, {self._high:g}]"
            problem = f"no score in {bounds} for {failures} of {len(prompts)} images: {reply.value}"
        return Answer(scores, failures, num_retries, problem)

    async def close(self) -> None:
        """Let go of open connections."""
        await self._client.close()

    def _texts(self, images: Tensor) -> list[str]:
        return [self._delivery.pngs.of(picture) for picture in pil_images(images)]


class DeqaReward(ServerReward):
    """DeQA-Score, image quality: 1 to 5 as published, 0 to 1 as AR-GRPO's server scales it."""

    def __init__(
        self,
        url: str,
        *,
        connection: Mapping[str, Any] | None = None,
        reward_batch: int = 8,
        name: str = "deqa",
    ) -> None:
        """Arguments as of `ServerReward`."""
        super().__init__(
            url, low=0, high=5, connection=connection, reward_batch=reward_batch, name=name
        )


class GenevalReward(ServerReward):
    """GenEval: the share of what the prompt asks for that a detector finds, from 0 to 1."""

    def __init__(
        self,
        url: str,
        *,
        metadata: str,
        connection: Mapping[str, Any] | None = None,
        reward_batch: int = 8,
        name: str = "geneval",
    ) -> None:
        """Arguments as of `ServerReward`; `metadata` is evaluation_metadata.jsonl of
        djghosh13/geneval, or lines of the same kind."""
        super().__init__(
            url,
            low=0,
            high=1,
            metadata=metadata,
            connection=connection,
            reward_batch=reward_batch,
            name=name,
        )


class ImageRewardServer(ServerReward):
    """ImageReward: about standard normal over images; its package pins an old timm, so it runs in
    an environment of its own."""

    def __init__(
        self,
        url: str,
        *,
        connection: Mapping[str, Any] | None = None,
        reward_batch: int = 8,
        name: str = "imagereward",
    ) -> None:
        """Arguments as of `ServerReward`."""
        super().__init__(url, connection=connection, reward_batch=reward_batch, name=name)


def read_scores(value: Any, count: int, low: float, high: float) -> Tensor:
    """The scores of a server's answer.

    Returns:
        [count] fp32; NaN for null, for what is no number, and for a number outside [low, high].

    Raises:
        RequestError: there are no scores, or not `count` of them.
    """
    scores = value.get("scores") if isinstance(value, dict) else None
    if not isinstance(scores, list):
        raise RequestError(f'expected {{"scores": [...]}}, got {str(value)[:200]}')
    if len(scores) != count:
        raise RequestError(f"expected {count} scores, got {len(scores)}")
    # Beyond it fp32 would be infinite.
    largest = torch.finfo(torch.float32).max
    low, high = max(low, -largest), min(high, largest)
    is_number = [isinstance(s, int | float) and not isinstance(s, bool) for s in scores]
    kept = [
        float(s) if ok and low <= s <= high else math.nan
        for s, ok in zip(scores, is_number, strict=True)
    ]
    return torch.tensor(kept, dtype=torch.float32)


def _read_metadata(path: str, place: str) -> dict[str, Any]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{place}.metadata: expected a file, got {file}")
    found = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            found[record["prompt"]] = record
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f'{place}.metadata: expected a JSON object with "prompt" on each line, got '
                f"{line[:80]!r} on line {number} of {file}"
            ) from error
    return found
