"""What the judges of all ranks said, put together in the order of a step's images."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from argrpo.ranks import gather_images, gather_json, gather_rows
from argrpo.rewards.lanes import Outcome
from argrpo.rewards.protocols import Answer
from argrpo.rewards.scoring import Scores


def scores_over_ranks(scores: Scores, image_ids: Tensor) -> Scores:
    """The scores of all ranks, the same on each of them but for words about failures.

    What a judge measures beside its scores, if it is no distribution reward, stays that of a rank.

    Args:
        scores: of this rank's images.
        image_ids: [n] int64 on the CPU, their places in the step.

    Raises:
        PeerError: another rank failed.
    """
    both = gather_images(torch.cat([scores.values, scores.monitored], dim=1), image_ids)
    outcomes = _outcomes_over_ranks(scores.outcomes, both)
    count = len(scores.names)
    taken = {
        f"{'rewards' if place < count else 'monitors'}/{outcome.name}/{key}": value
        for place, outcome in enumerate(outcomes)
        for key, value in outcome.metrics().items()
    }
    return replace(
        scores,
        values=both[:, :count],
        monitored=both[:, count:],
        outcomes=outcomes,
        measured=scores.measured | {key: taken[key] for key in taken if key in scores.measured},
    )


def extras_over_ranks(extras: dict[str, dict[str, list[Any]]]) -> dict[str, dict[str, list[Any]]]:
    """The tables of all ranks, one below the other in the order of the ranks."""
    together: dict[str, dict[str, list[Any]]] = {}
    for part in gather_json(extras):
        for judge, columns in part.items():
            for name, values in columns.items():
                together.setdefault(judge, {}).setdefault(name, []).extend(values)
    return together


def _outcomes_over_ranks(outcomes: list[Outcome], scores: Tensor) -> list[Outcome]:
    counts = [[o.answer.num_failures, o.answer.num_retries] for o in outcomes]
    sizes = [[o.seconds, o.batch] for o in outcomes]
    numbers = torch.tensor([counts, sizes], dtype=torch.float64).flatten()
    every, _ = gather_rows(numbers[None])
    of_ranks = every.view(len(every), 2, len(outcomes), 2)
    failures, retries = of_ranks[:, 0].sum(dim=0).long().unbind(dim=1)
    seconds, batch = of_ranks[:, 1].amax(dim=0).unbind(dim=1)
    return [
        Outcome(
            own.name,
            Answer(
                scores[:, place],
                int(failures[place]),
                int(retries[place]),
                own.answer.problem or _elsewhere(int(failures[place])),
            ),
            float(seconds[place]),
            int(batch[place]),
        )
        for place, own in enumerate(outcomes)
    ]


def _elsewhere(num_failures: int) -> str | None:
    return "on another rank" if num_failures else None
