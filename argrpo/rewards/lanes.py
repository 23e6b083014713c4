"""One judge's way through a step's images: in this thread, or somewhere else.

Shapes: N images of a step, n images of a stretch.
"""

import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.engine.ranges import Ranges
from argrpo.rewards.background_loop import BackgroundLoop
from argrpo.rewards.protocols import (
    Answer,
    Answering,
    Applying,
    Batched,
    DistributionReward,
    RemoteReward,
    Resting,
    Reward,
)

Judge = Reward | RemoteReward | DistributionReward


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What one judge said of a step's images."""

    name: str
    answer: Answer  # of all N images, scores on the CPU
    seconds: float  # of a local judge's own work; behind a server from first image to last answer
    batch: int  # images it was given at a time, at the most
    peak_bytes: int | None = None  # of GPU memory in use at once while it worked, whoever's

    def metrics(self) -> dict[str, float]:
        """seconds, batch, failures, retries, on a GPU peak_bytes, and what the judge logged."""
        return {
            "seconds": self.seconds,
            "batch": float(self.batch),
            "failures": float(self.answer.num_failures),
            "retries": float(self.answer.num_retries),
            **({} if self.peak_bytes is None else {"peak_bytes": float(self.peak_bytes)}),
            **{name: fmean(values) for name, values in self.answer.logged.metrics.items()},
        }


class Stretches:
    """Which images a judge is given together; the same however they come."""

    def __init__(self, judge: Judge, num_images: int) -> None:
        self._num_images = num_images
        size = judge.reward_batch if isinstance(judge, Batched) else num_images
        self.size = min(size, num_images)
        self._num_given = 0

    def ready(self, num_there: int) -> Iterator[slice]:
        """The whole stretches among the first images, each of them once."""
        while self._num_given < num_there:
            stop = min(self._num_given + self.size, self._num_images)
            if stop > num_there:
                return
            rows = slice(self._num_given, stop)
            self._num_given = stop
            yield rows


class LocalLane:
    """A judge that works in this thread, on a GPU as far as launches go."""

    def __init__(self, judge: Reward | DistributionReward, num_images: int, ranges: Ranges) -> None:
        self.judge = judge
        self.stretches = Stretches(judge, num_images)
        self._ranges = ranges
        self._answers: list[Answer] = []
        self._applies: list[bool] = []  # by image, where the judge knows
        self._calls = _CallClock()

    def take(self, images: Tensor, prompts: list[Prompt]) -> None:
        """Score [n, 3, H, W].

        Raises:
            ValueError: the scores are not [n].
            torch.OutOfMemoryError: the judge did not fit, named.
        """
        judge = self.judge
        try:
            with self._ranges(f"reward {judge.name}"), self._calls.counted(images.device):
                answer = _asked(judge, images, prompts)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"rewards.{judge.name}: expected memory for {len(images)} images, got none; lower "
                f"its option reward_batch, or tokenizer.decode_batch ({error})"
            ) from error
        check_shape(judge, answer, len(prompts))
        self._answers.append(answer)
        if isinstance(judge, Applying):
            self._applies += judge.applies(prompts)

    def outcome(self) -> Outcome:
        """Waits for the device."""
        answer = Answer.joined(self._answers)
        answer = replace(answer, scores=answer.scores.cpu())
        if isinstance(self.judge, Resting):
            self.judge.rest()
        if not isinstance(self.judge, Answering):
            applies = torch.tensor(self._applies) if self._applies else None
            answer = Answer.of(answer.scores, applies)
        answer = answer.without_infinity()
        seconds, peak = self._calls.seconds(), self._calls.peak_bytes
        return Outcome(self.judge.name, answer, seconds, self.stretches.size, peak)

    def cancel(self) -> None:
        """Nothing is under way between calls."""


class RemoteLane:
    """A judge that is asked in the background."""

    def __init__(self, judge: RemoteReward, num_images: int, loop: BackgroundLoop) -> None:
        self.judge = judge
        self.stretches = Stretches(judge, num_images)
        self._loop = loop
        self._asked: list[tuple[Future[Answer], int]] = []
        self._started = 0.0
        self._ended = 0.0

    def take(self, images: Tensor, prompts: list[Prompt]) -> None:
        """Ask about [n, 3, H, W] on the CPU."""
        if not self._asked:
            self._started = time.perf_counter()
        future = self._loop.submit(self._ask(images, prompts))
        self._asked.append((future, len(prompts)))

    def outcome(self, due: float, deadline_s: float) -> Outcome:
        """What was answered by `due`, a time.perf_counter(); the rest is given up.

        Raises:
            ValueError: the scores of an answer are not [n].
            Exception: whatever `ask` raises.
        """
        futures = [future for future, _ in self._asked]
        wait(futures, max(due - time.perf_counter(), 0.0), return_when=FIRST_EXCEPTION)
        late = f"no answer within {deadline_s:g} s of the step's last image"
        answers = []
        for future, count in self._asked:
            if future.done():
                answer = future.result()
                check_shape(self.judge, answer, count)
            else:
                future.cancel()
                answer = Answer.none(count, late)
                self._ended = time.perf_counter()
            answers.append(answer)
        answer = Answer.joined(answers).without_infinity()
        seconds = self._ended - self._started
        return Outcome(self.judge.name, answer, seconds, self.stretches.size)

    def cancel(self) -> None:
        """Give up all requests."""
        for future, _ in self._asked:
            future.cancel()

    async def _ask(self, images: Tensor, prompts: list[Prompt]) -> Answer:
        answer = await self.judge.ask(images, prompts)
        # Not in a callback of the future, which may come after whoever waits for it has gone on.
        self._ended = time.perf_counter()
        return answer


def check_shape(judge: Judge, answer: Answer, count: int) -> None:
    """ValueError unless there is a score for each image."""
    if answer.scores.shape != (count,):
        raise ValueError(
            f"rewards.{judge.name}: expected scores of shape [{count}], "
            f"got {list(answer.scores.shape)}"
        )


def _asked(judge: Reward | DistributionReward, images: Tensor, prompts: list[Prompt]) -> Answer:
    if isinstance(judge, DistributionReward):
        return Answer(judge.score(images, prompts))
    if isinstance(judge, Answering):
        return judge.answer(images, prompts)
    return Answer(judge(images, prompts))


class _CallClock:
    """Seconds inside some calls, of the host or of the GPU stream they launch into, and the GPU
    memory in use at once."""

    def __init__(self) -> None:
        self.peak_bytes: int | None = None
        self._seconds = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def counted(self, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The allocator counts on the host, so neither of these waits for the device.
            torch.cuda.reset_peak_memory_stats(device)
            first.record()
            yield
            last.record()
            self._marks.append((first, last))
            peak = torch.cuda.max_memory_allocated(device)
            self.peak_bytes = max(self.peak_bytes or 0, peak)
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def seconds(self) -> float:
        for first, last in self._marks:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000.0
        self._marks.clear()
        return self._seconds
