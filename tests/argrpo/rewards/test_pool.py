"""Judges at work together: the same scores however images come, and nobody waits for ever."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.rewards import background_loop, pool
from argrpo.rewards.background_loop import BackgroundLoop
from argrpo.rewards.lanes import Judge, Outcome
from argrpo.rewards.pool import Asking, Scoring
from argrpo.rewards.protocols import Answer, StepContext

_N = 10
_PROMPTS = [Prompt(f"prompt {i}", prompt_id=i) for i in range(_N)]


class Local:
    """Sees images in stretches; a product of them rounds another way in another batch."""

    def __init__(self, name: str = "local", reward_batch: int = 4) -> None:
        self.name, self.reward_batch = name, reward_batch
        self.batches: list[list[int]] = []
        self._weight = torch.randn(48, 48, generator=torch.Generator().manual_seed(0))

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        self.batches.append([prompt.prompt_id for prompt in prompts])
        return (images.flatten(1) @ self._weight).tanh().sum(dim=1)


class Whole:
    """A function of the batch: one call a step, or other scores."""

    name = "whole"

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        return images.mean(dim=(1, 2, 3)) - images.mean()


class Distribution:
    name = "distribution"

    def score(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        return images.std(dim=(1, 2, 3)) / images.std()

    def update(self) -> None: ...

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class Remote:
    """Answers late, the first image last."""

    def __init__(self, delay_s: float = 0.0, reward_batch: int = 3) -> None:
        self.name, self.reward_batch, self._delay_s = "remote", reward_batch, delay_s
        self.started: list[float] = []
        self.threads: set[str] = set()

    async def ask(self, images: Tensor, prompts: list[Prompt]) -> Answer:
        self.started.append(time.perf_counter())
        self.threads.add(threading.current_thread().name)
        await asyncio.sleep(self._delay_s / (1 + prompts[0].prompt_id))
        return Answer.of(images.mean(dim=(1, 2, 3)))


@pytest.fixture
def loop() -> Iterator[BackgroundLoop]:
    loop = BackgroundLoop()
    yield loop
    loop.close()


def _outcomes(
    judges: list[Judge], images: Tensor, loop: BackgroundLoop, sizes: tuple[int, ...] = (_N,),
    deadline_s: float = 30.0,
) -> list[Outcome]:  # fmt: skip
    scoring = Scoring(judges, _PROMPTS, Asking(loop, deadline_s))
    for part in images.split(sizes):
        scoring.add(part)
    return scoring.finish()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(_N, 3, 4, 4)


@pytest.mark.parametrize("sizes", [(3, 3, 4), (1,) * _N, (7, 3), (4, 0, 6)])
def test_scores_are_the_same_to_the_bit_however_images_come(
    images: Tensor, loop: BackgroundLoop, sizes: tuple[int, ...]
) -> None:
    def all_kinds() -> list[Judge]:
        return [Remote(0.02), Local(), Whole(), Distribution()]

    together = _outcomes(all_kinds(), images, loop)
    apart = _outcomes(all_kinds(), images, loop, sizes)
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one.answer.scores, other.answer.scores), one.name
    alone = [Whole()(images, _PROMPTS), Distribution().score(images, _PROMPTS)]
    assert torch.equal(together[2].answer.scores, alone[0])
    assert torch.equal(together[3].answer.scores, alone[1])


def test_a_judge_sees_stretches_from_the_first_image_on_each_once(
    images: Tensor, loop: BackgroundLoop
) -> None:
    judge = Local()
    (outcome,) = _outcomes([judge], images, loop, (3, 5, 2))
    assert judge.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert outcome.metrics()["batch"] == 4
    expected = torch.cat([judge(images[i : i + 4], _PROMPTS[i : i + 4]) for i in (0, 4, 8)])
    assert torch.equal(outcome.answer.scores, expected)


def test_servers_are_asked_while_images_are_still_to_come(
    images: Tensor, loop: BackgroundLoop
) -> None:
    judge = Remote()
    scoring = Scoring([judge], _PROMPTS, Asking(loop, 30.0))
    scoring.add(images[:7])
    deadline = time.perf_counter() + 10
    while len(judge.started) < 2 and time.perf_counter() < deadline:
        time.sleep(0.005)
    assert len(judge.started) == 2, "two stretches of three are there, the third is not"
    scoring.add(images[7:])
    assert torch.equal(scoring.finish()[0].answer.scores, images.mean(dim=(1, 2, 3)))
    assert judge.threads == {"argrpo judges"}


def test_judges_behind_servers_wait_together_and_beside_local_ones(
    images: Tensor, loop: BackgroundLoop
) -> None:
    class Slow(Local):
        def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
            time.sleep(0.1)
            return super().__call__(images, prompts)

    class Late(Remote):
        async def ask(self, images: Tensor, prompts: list[Prompt]) -> Answer:
            await asyncio.sleep(0.3)
            return Answer.of(images.mean(dim=(1, 2, 3)))

    started = time.perf_counter()
    outcomes = _outcomes([Late(), Late(), Slow()], images, loop)
    elapsed = time.perf_counter() - started
    # One after the other it would be 8 requests of 0.3 s and 3 calls of 0.1 s: 2.7 s.
    assert 0.3 <= elapsed < 1.5
    assert outcomes[0].seconds >= 0.3 and outcomes[2].seconds >= 0.3


def test_who_has_not_answered_by_the_deadline_has_no_score(
    images: Tensor, loop: BackgroundLoop
) -> None:
    class Stuck(Remote):
        async def ask(self, images: Tensor, prompts: list[Prompt]) -> Answer:
            if prompts[0].prompt_id == 3:
                await asyncio.Event().wait()
            return Answer.of(images.mean(dim=(1, 2, 3)))

    started = time.perf_counter()
    (outcome,) = _outcomes([Stuck()], images, loop, deadline_s=0.2)
    assert time.perf_counter() - started < 5
    scores = outcome.answer.scores
    assert scores[3:6].isnan().all() and outcome.answer.num_failures == 3
    assert torch.equal(
        scores[[0, 1, 2, 6, 7, 8, 9]], images.mean(dim=(1, 2, 3))[[0, 1, 2, 6, 7, 8, 9]]
    )
    assert outcome.answer.problem == "no answer within 0.2 s of the step's last image"


def test_an_infinite_score_is_none_and_takes_no_other_with_it(
    images: Tensor, loop: BackgroundLoop
) -> None:
    class Huge(Local):
        def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
            scores = images.mean(dim=(1, 2, 3))
            return scores.masked_fill(torch.tensor([p.prompt_id == 5 for p in prompts]), torch.inf)

    class HugeRemote(Remote):
        async def ask(self, images: Tensor, prompts: list[Prompt]) -> Answer:
            return Answer.of(Huge()(images, prompts))

    for outcome in _outcomes([Huge(), HugeRemote()], images, loop):
        scores = outcome.answer.scores
        assert scores[5].isnan() and scores.isfinite().sum() == _N - 1, outcome.name
        assert outcome.answer.num_failures == 1
        assert outcome.answer.problem == "infinity for 1 of 10 images"


def test_seconds_of_a_server_are_between_the_first_image_and_the_last_answer(
    images: Tensor, loop: BackgroundLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever waits goes on before a future calls back.
    with monkeypatch.context() as patched:
        patched.setattr(Future, "_invoke_callbacks", lambda self: None)
        (outcome,) = _outcomes([Remote()], images, loop)
    assert 0.0 <= outcome.seconds < 30.0


def test_what_a_judge_of_yours_raises_ends_the_step(images: Tensor, loop: BackgroundLoop) -> None:
    class Broken(Remote):
        async def ask(self, images: Tensor, prompts: list[Prompt]) -> Answer:
            raise KeyError("a bug")

    def broken(images: Tensor, prompts: list[Prompt]) -> Tensor:
        raise KeyError("a bug")

    local = Local()
    local.__class__ = type("BrokenLocal", (Local,), {"__call__": lambda *_: broken(*_[1:])})
    for judge in (Broken(), local):
        with pytest.raises(KeyError, match="a bug"):
            _outcomes([judge], images, loop)


def test_scores_of_another_shape_are_refused_by_name(images: Tensor, loop: BackgroundLoop) -> None:
    class Short(Remote):
        async def ask(self, images: Tensor, prompts: list[Prompt]) -> Answer:
            return Answer.of(images.mean(dim=(1, 2, 3))[1:])

    with pytest.raises(
        ValueError, match=r"rewards\.remote: expected scores of shape \[3\], got \[2"
    ):
        _outcomes([Short()], images, loop)


def test_memory_that_runs_out_names_the_judge_and_what_to_do(
    images: Tensor, loop: BackgroundLoop
) -> None:
    class Large(Local):
        def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(
        torch.OutOfMemoryError, match=r"rewards\.local: .* for 4 images.*reward_batch"
    ):
        _outcomes([Large()], images, loop)


def test_a_judge_that_asks_is_told_of_the_step(images: Tensor, loop: BackgroundLoop) -> None:
    class Curious(Whole):
        def seeing(self, context: StepContext) -> "Curious":
            self.seen = context
            return self

    judge = Curious()
    scoring = Scoring([judge], _PROMPTS, Asking(loop, 1.0), StepContext(3, 9))
    ids = torch.arange(2 * _N).view(_N, 2)
    scoring.add(images[:4], ids[:4])
    scoring.add(images[4:], ids[4:])
    scoring.finish()
    assert (judge.seen.step, judge.seen.num_steps) == (3, 9)
    assert judge.seen.token_ids is not None and torch.equal(judge.seen.token_ids, ids)


def test_no_gradient_is_kept_through_a_local_judge(images: Tensor, loop: BackgroundLoop) -> None:
    weight = torch.ones((), requires_grad=True)

    class Learned(Whole):
        def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
            return images.mean(dim=(1, 2, 3)) * weight

    (outcome,) = _outcomes([Learned()], images, loop)
    assert not outcome.answer.scores.requires_grad


def test_a_loop_that_was_closed_gives_up_its_work_and_starts_again() -> None:
    loop = BackgroundLoop()
    loop.close()

    async def forever() -> None:
        await asyncio.Event().wait()

    async def one() -> int:
        return 1

    waiting = loop.submit(forever())
    loop.close()
    assert waiting.cancelled()
    assert loop.submit(one()).result(timeout=10) == 1
    loop.close()


def test_a_judge_that_blocks_the_loop_costs_its_scores_and_not_the_end_of_the_run(
    images: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (background_loop, pool):
        monkeypatch.setattr(module, "CLOSING_S", 0.1)
    released = threading.Event()

    class Blocking(Remote):
        async def ask(self, images: Tensor, prompts: list[Prompt]) -> Answer:
            released.wait(30)  # as requests.post would, where a server hangs
            return Answer.of(images.mean(dim=(1, 2, 3)))

        async def close(self) -> None: ...

    asking, judge = Asking(BackgroundLoop(), 0.2), Blocking(reward_batch=_N)
    scoring = Scoring([judge], _PROMPTS, asking)
    scoring.add(images)
    assert scoring.finish()[0].answer.num_failures == _N
    started = time.perf_counter()
    asking.close([judge])
    # Two waits of 0.1 s; the rest is a busy machine's.
    assert time.perf_counter() - started < 5
    assert "has to await what it waits for" in caplog.text
    (after,) = _outcomes([Remote()], images, asking.loop)
    assert after.answer.num_failures == 0
    released.set()
    asking.loop.close()


def test_a_judge_may_leave_the_device_once_it_has_scored_all(
    images: Tensor, loop: BackgroundLoop
) -> None:
    class Offloaded(Local):
        def rest(self) -> None:
            self.batches.append([])

    judge = Offloaded()
    _outcomes([judge], images, loop, (4, 6))
    assert judge.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], []]


def test_a_judge_behind_a_server_goes_through_a_map_of_steps(
    images: Tensor, loop: BackgroundLoop
) -> None:
    from argrpo.rewards.quantize import QuantizedRemoteReward, StepMap

    judge = QuantizedRemoteReward(Remote(), StepMap([0.0, 0.45], [0.0, 1.0]), "steps")
    (outcome,) = _outcomes([judge], images, loop, (4, 6))
    means = images.mean(dim=(1, 2, 3))
    assert torch.equal(outcome.answer.scores.isnan(), means >= 0.45)
    assert (outcome.answer.scores[means < 0.45] == 1.0).all()
    assert outcome.answer.num_failures == int((means >= 0.45).sum()) > 0
