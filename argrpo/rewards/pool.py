"""A step's images on their way through all judges, while others are still being drawn.

Judges behind servers get images as soon as they are there, and work while everything here goes on.
Local judges run in the caller's thread: on a GPU at once, because launches return while the work is
queued; on a CPU when all images are there, because they would only hold up the images that servers
wait for; and where a step is drawn ahead, when its turn comes, because what a judge says may depend
on the step before. Which images a judge sees together is the same whenever they come (`Batched`),
and scores are put together in the order of the images, so that overlap changes no bit of them.

Shapes: N images of a step, n of them.
"""

import time
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.engine.ranges import Ranges, no_ranges
from argrpo.rewards.background_loop import CLOSING_S, BackgroundLoop
from argrpo.rewards.delivery import Delivery, PngTexts
from argrpo.rewards.lanes import Judge, LocalLane, Outcome, RemoteLane
from argrpo.rewards.protocols import (
    Closing,
    ContextReward,
    Delivering,
    RemoteReward,
    StepContext,
)


@dataclass(frozen=True, slots=True)
class Asking:
    """How judges are asked."""

    loop: BackgroundLoop  # where judges behind servers are
    deadline_s: float  # that these have after the last image
    ranges: Ranges = no_ranges  # told which local judge is at work
    local_at_once: bool = True  # whether local judges on a GPU begin before `finish`

    def close(self, judges: Sequence[Judge]) -> None:
        """Let go of the judges' servers, and end the thread that asks them; both come back when
        they are needed."""
        for judge in judges:
            if isinstance(judge, Closing):
                wait([self.loop.submit(judge.close())], CLOSING_S)
        self.loop.close()


class Scoring:
    """One step. `add` its images in order, then `finish`."""

    def __init__(
        self,
        judges: Sequence[Judge],
        prompts: list[Prompt],
        asking: Asking,
        context: StepContext | None = None,
    ) -> None:
        """
        Args:
            judges: each is asked once about each image.
            prompts: N, those of the images.
            asking: how.
            context: of the step; its token_ids are those given to `add`.
        """
        self._prompts = prompts
        self._asking = asking
        self._context = context or StepContext()
        self._images: Tensor | None = None  # [N, 3, H, W], filled from the first on
        self._token_ids: list[Tensor] = []
        self._num_images = 0
        self._deadline = _Deadline(asking.deadline_s)
        num_senders = sum(isinstance(judge, Delivering) for judge in judges)
        delivery = Delivery(self._deadline, PngTexts(num_senders))
        self._lanes = [_lane(judge, len(prompts), asking, delivery) for judge in judges]

    @property
    def num_images(self) -> int:
        """N."""
        return len(self._prompts)

    def add(self, images: Tensor, token_ids: Tensor | None = None) -> None:
        """The next images of the step.

        Args:
            images: [n, 3, H, W] in [0, 1] on the judges' device.
            token_ids: [n, T] int64 that they were decoded from, where they were.
        """
        if self._images is None:
            self._images = images.new_empty(len(self._prompts), *images.shape[1:])
        self._images[self._num_images : self._num_images + len(images)] = images
        self._num_images += len(images)
        if token_ids is not None:
            self._token_ids.append(token_ids)
        self._deadline.set()
        self._ask_servers()
        if images.is_cuda and self._asking.local_at_once:
            self._work_here()

    def finish(self) -> list[Outcome]:
        """What each judge said, in the order of the judges, once all images were added.

        Raises:
            ValueError: a judge returned another shape than [n].
            torch.OutOfMemoryError: a local judge did not fit, named.
            Exception: whatever a judge of the caller's raises.
        """
        assert self._num_images == len(self._prompts), "add all images first"
        try:
            self._work_here()
            return [
                lane.outcome(self._deadline(), self._asking.deadline_s)
                if isinstance(lane, RemoteLane)
                else lane.outcome()
                for lane in self._lanes
            ]
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Give up what is under way."""
        for lane in self._lanes:
            lane.cancel()

    def _ask_servers(self) -> None:
        assert self._images is not None
        lanes = [lane for lane in self._lanes if isinstance(lane, RemoteLane)]
        if not lanes:
            return
        # One copy for all; on a GPU it waits for the images and for nothing queued elsewhere.
        images = self._images[: self._num_images].cpu()
        for lane in lanes:
            self._give(lane, images)

    @torch.no_grad()
    def _work_here(self) -> None:
        assert self._images is not None
        for lane in self._lanes:
            if isinstance(lane, LocalLane):
                self._give(lane, self._images)

    def _give(self, lane: LocalLane | RemoteLane, images: Tensor) -> None:
        for rows in lane.stretches.ready(self._num_images):
            if isinstance(lane.judge, ContextReward):
                lane.judge = lane.judge.seeing(self._seen())
            lane.take(images[rows], self._prompts[rows])

    def _seen(self) -> StepContext:
        ids = torch.cat(self._token_ids).cpu() if self._token_ids else None
        return replace(self._context, token_ids=ids)


class _Deadline:
    """A `Due`: seconds after the last image so far. No part of `Scoring`, so that a judge that
    knows it does not hold the images."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._started = 0.0

    def set(self) -> None:
        """An image is there."""
        self._started = time.perf_counter()

    def __call__(self) -> float:
        return self._started + self._seconds


def _lane(
    judge: Judge, num_images: int, asking: Asking, delivery: Delivery
) -> LocalLane | RemoteLane:
    if isinstance(judge, RemoteReward):
        told = judge.within(delivery) if isinstance(judge, Delivering) else judge
        return RemoteLane(told, num_images, asking.loop)
    return LocalLane(judge, num_images, asking.ranges)
