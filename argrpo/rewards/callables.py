"""Functions as judges: of images and prompts, or as TRL calls its reward functions.

    def f(images, prompts)                               ours: a tensor [N, 3, H, W], N `Prompt`s
    def f(prompts, completions, **kwargs)                TRL's: all by keyword, lists of N
    async def of either                                  waits in the judges' event loop

A function is called the second way if it has a parameter `completions` or `completion_ids`, or
takes any keyword. It gets, as far as it asks for them:

    prompts          texts
    completions      Pillow images; only where named, or where keywords are taken and `images` is
                     not named, because making them costs more than many judges
    images           the tensor itself, on its device: ours, for judges that need no Pillow
    completion_ids   lists of token ids
    trainer_state    global_step and max_steps
    log_metric       log_metric(name, value): logged as rewards/NAME/name, the mean over a step
    log_extra        log_extra(column, values): to reward_extras.jsonl of the run
    class_id, prompt_id                       the columns of our prompts
    reference_image                           their pictures [3, H, W], or None, read for each call

It returns a number for each image, or None where it does not apply; None is no failure, and NaN is
one. What it raises ends the run.

Source: huggingface/trl at f2cd577, trl/trainer/grpo_trainer.py, `_calculate_rewards`.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.rewards.image_transfer import pil_images
from argrpo.rewards.protocols import Answer, Logged, StepContext
from argrpo.rewards.reference_images import reference_images

Function = Callable[..., Any]

_SHOWN = 80  # characters of what a function returned in a message


class TrainerState(NamedTuple):
    """What of transformers.TrainerState means something here."""

    global_step: int  # 1-based: the step that is under way
    max_steps: int


def function_reward(
    name: str, function: Function
) -> "FunctionReward | AsyncFunctionReward | TrlReward | AsyncTrlReward":
    """The judge that a function is."""
    parameters = inspect.signature(function).parameters
    has_keywords = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    is_trl = has_keywords or bool({"completions", "completion_ids"} & set(parameters))
    if inspect.iscoroutinefunction(function):
        return AsyncTrlReward(name, function) if is_trl else AsyncFunctionReward(name, function)
    return TrlReward(name, function) if is_trl else FunctionReward(name, function)


class FunctionReward:
    """A plain function of (images, prompts)."""

    def __init__(self, name: str, function: Callable[[Tensor, list[Prompt]], Tensor]) -> None:
        self.name = name
        self._function = function

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """[N, 3, H, W] in [0, 1] and N prompts -> [N] fp32."""
        return _scores(self.name, self._function(images, prompts))


class AsyncFunctionReward:
    """A coroutine function of (images, prompts); images are on the CPU."""

    def __init__(
        self, name: str, function: Callable[[Tensor, list[Prompt]], Awaitable[Tensor]]
    ) -> None:
        self.name = name
        self._function = function

    async def ask(self, images: Tensor, prompts: list[Prompt]) -> Answer:
        """One call."""
        found = await self._function(images, prompts)
        return Answer.of(_scores(self.name, found))


class _TrlCall:
    """What one function is called with, and what it logs."""

    def __init__(self, name: str, function: Function, context: StepContext | None = None) -> None:
        self.name = name
        self._function = function
        parameters = inspect.signature(function).parameters
        self._named = set(parameters)
        self._takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._context = context or StepContext()

    def seeing(self, context: StepContext) -> Self:
        """The same function, for the images of a step."""
        return type(self)(self.name, self._function, context)

    def _keywords(self, images: Tensor, prompts: list[Prompt], logged: Logged) -> dict[str, Any]:
        context, named = self._context, self._named
        found: dict[str, Any] = {
            "prompts": [prompt.text for prompt in prompts],
            "trainer_state": TrainerState(context.step, context.num_steps),
            "log_metric": lambda name, value: _log(logged.metrics, name, [float(value)]),
            "log_extra": lambda column, values: _log(logged.extras, column, values),
            "class_id": [prompt.class_id for prompt in prompts],
            "prompt_id": [prompt.prompt_id for prompt in prompts],
        }
        if "reference_image" in named or self._takes_any:
            found["reference_image"] = reference_images(prompts)
        if "images" in named:
            found["images"] = images
        if "completions" in named or (self._takes_any and "images" not in named):
            found["completions"] = pil_images(images)
        if "completion_ids" in named or self._takes_any:
            ids = context.token_ids
            found["completion_ids"] = [[] for _ in prompts] if ids is None else ids.tolist()
        return found if self._takes_any else {k: v for k, v in found.items() if k in named}

    def _answer(self, returned: Any, logged: Logged) -> Answer:
        try:
            values = [value if value is None else float(value) for value in returned]
        except (TypeError, ValueError) as error:
            raise _no_numbers(self.name, returned) from error
        scores = torch.tensor([torch.nan if value is None else value for value in values])
        failures = sum(value is not None and value != value for value in values)
        problem = f"NaN for {failures} of {len(values)} images" if failures else None
        return Answer(scores, failures, 0, problem, logged)


def _scores(name: str, returned: Any) -> Tensor:
    try:
        return torch.as_tensor(returned, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _no_numbers(name, returned) from error


def _no_numbers(name: str, returned: object) -> ValueError:
    shown = repr(returned)[:_SHOWN]
    return ValueError(f"rewards.{name}: expected a number for each image, got {shown}")


def _log(table: dict[str, list[Any]], name: str, values: list[Any]) -> None:
    table.setdefault(name, []).extend(values)


class TrlReward(_TrlCall):
    """A reward function as TRL calls it."""

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """[N, 3, H, W] in [0, 1] and N prompts -> [N] fp32, NaN where it gives None or NaN."""
        return self.answer(images, prompts).scores

    def answer(self, images: Tensor, prompts: list[Prompt]) -> Answer:
        """As a call, and tells what does not apply from what failed."""
        logged = Logged()
        return self._answer(self._function(**self._keywords(images, prompts, logged)), logged)


class AsyncTrlReward(_TrlCall):
    """A coroutine function as TRL calls its reward functions."""

    async def ask(self, images: Tensor, prompts: list[Prompt]) -> Answer:
        """One call."""
        logged = Logged()
        # In a thread: making pictures would hold up the requests of the loop.
        keywords = await asyncio.to_thread(self._keywords, images, prompts, logged)
        return self._answer(await self._function(**keywords), logged)
