"""Whether the method does what its papers claim, on real digits, over several seeds.

    python bench/learning_study.py              an hour on one core; goes on where it stopped
    python bench/learning_study.py --smoke      one seed, minutes; rows go to runs/learning_smoke
    python bench/learning_study.py --summary    the table and the plots again, from the rows alone

One row for each training, appended to OUTPUT/rows.jsonl as soon as it is measured: seed by seed, so
that a study that was cut is still balanced. First come the judge alone and some weights of LOO-FID
on the first seed: `chosen_weight` takes one of them by a rule, and it is held for all seeds. Last
come longer runs, and more weights for the frontier.

What the arms are stands in study_arms.py, what is measured in study_measures.py, the claims in
study_claims.py, the page in study_tables.py.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from result_rows import Row, append_row, environment, rows_in
from study_arms import ARMS, WITH_LOOFID, Job, train
from study_claims import CANDIDATES, chosen_weight
from study_measures import BASE_SCALES, SCALES, measure
from study_plots import draw_plots
from study_tables import summary

from argrpo.digits.assets import DigitsAssets, default_cache_dir, digits_assets

RESULTS = Path(__file__).parent / "results" / "learning"
SMOKE = Path(__file__).parents[1] / "runs" / "learning_smoke"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much a study does."""

    steps: int = 56
    group: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)
    weights: tuple[float, ...] = CANDIDATES
    """Of LOO-FID, tried on the first seed for the arms to take one."""

    more_weights: tuple[float, ...] = (0.0, 1.0, 4.0)
    """Of the frontier alone; 0 is the reward for entropy without LOO-FID."""

    long_steps: int = 168
    """Of more runs of judge and of judge_loofid, on every seed, last in the plan but the weights:
    claims (a) and (b) depend on how far a policy goes from the base. 0 leaves them out."""

    loose_beta: float = 0.03
    """Weight of the KL in the long runs: with 0.1 hardly any recall is lost that could be given
    back, with 0.01 noise ruins the policy whatever the rewards are."""

    evaluation_images: int = 600


SIZES = {
    "full": Size(),
    "smoke": Size(
        steps=12, seeds=(0,), weights=(2.0,), more_weights=(), long_steps=0, evaluation_images=300
    ),
}


def planned(size: Size, rows: list[Row]) -> Iterator[Job]:
    """All trainings in their order; the weight comes from the rows of those before it."""
    sizes = {"steps": size.steps, "group": size.group}
    first = size.seeds[0]
    yield Job(arm="judge", seed=first, **sizes)
    for weight in size.weights:
        yield Job(arm="judge_loofid", seed=first, loo_fid_weight=weight, **sizes)
    chosen = chosen_weight(rows)
    for seed in size.seeds:
        for arm in ARMS:
            yield Job(
                arm=arm,
                seed=seed,
                loo_fid_weight=chosen if arm in WITH_LOOFID else 0.0,
                **sizes,
            )
    if size.long_steps:
        longer = {"steps": size.long_steps, "group": size.group, "beta": size.loose_beta}
        for seed in size.seeds:
            judge = Job(arm="judge", seed=seed, **longer)
            yield judge
            yield replace(judge, arm="judge_loofid", loo_fid_weight=chosen)
        # The released weight, where there is recall to give back.
        yield Job(arm="judge_loofid", seed=first, loo_fid_weight=CANDIDATES[-1], **longer)
    for weight in size.more_weights:
        yield Job(arm="judge_loofid", seed=first, loo_fid_weight=weight, **sizes)


def is_done(job: Job, rows: list[Row]) -> bool:
    """Whether a row of this very job is there, by whatever commit."""
    return any(all(row.get(key) == value for key, value in asdict(job).items()) for row in rows)


def run(job: Job, size: Size, assets: DigitsAssets) -> Row:
    """Train and measure: one row."""
    with tempfile.TemporaryDirectory() as folder:
        trained = train(job, assets, Path(folder) / "run")
    started = time.monotonic()
    scales = BASE_SCALES if job.arm == "base" else SCALES
    scores = measure(
        trained.policy, assets, scales=scales, count=size.evaluation_images, seed=job.seed
    )
    return {
        **asdict(job),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "evaluation_images": size.evaluation_images,
        "images": 0 if job.arm == "base" else job.images,
        "train_seconds": round(trained.seconds, 1),
        "measure_seconds": round(time.monotonic() - started, 1),
        "scores": scores,
        "curves": trained.curves,
    }


def main() -> None:
    args = parsed_arguments()
    output = args.output or (SMOKE if args.smoke else RESULTS)
    path = output / "rows.jsonl"
    if not args.summary:
        study(SIZES["smoke" if args.smoke else "full"], path, args.minutes)
    rows = rows_in(path)
    if not rows:
        raise SystemExit(f"output: expected rows in {path}, got none; run the study first")
    text = summary(rows)
    (output / "summary.md").write_text(text, encoding="utf-8")
    draw_plots(rows, output)
    print(text)


def study(size: Size, path: Path, minutes: float) -> None:
    """Run what no row is there of; begin nothing after so many minutes."""
    started = time.monotonic()
    # Another number of threads sums in another order.
    torch.set_num_threads(1)
    assets = digits_assets(default_cache_dir())
    # Once: the code that runs is the one that was loaded.
    facts: Row = dict(environment(torch.device("cpu")))
    for job in jobs_to_do(size, path):
        if time.monotonic() - started > 60 * minutes:
            print("out of time; the next call goes on here", flush=True)
            return
        row = facts | run(job, size, assets)
        append_row(path, row)
        last = row["scores"][-1]
        print(
            f"{(time.monotonic() - started) / 60:5.1f} min  {job.arm} seed {job.seed} "
            f"weight {job.loo_fid_weight:g}: trained {row['train_seconds']:g} s, at guidance "
            f"{last['guidance_scale']:g} accuracy {last['accuracy']:.3f}, recall "
            f"{last['recall']:.3f}, Frechet distance {last['frechet']:.1f}",
            flush=True,
        )


def jobs_to_do(size: Size, path: Path) -> Iterator[Job]:
    """Those planned that have no row, looked up one by one."""
    while True:
        rows = rows_in(path)
        job = next((job for job in planned(size, rows) if not is_done(job, rows)), None)
        if job is None:
            return
        yield job


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one seed, few steps")
    parser.add_argument("--summary", action="store_true", help="train nothing")
    parser.add_argument("--output", type=Path, help="folder of rows, table and plots")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing after these")
    return parser.parse_args()


if __name__ == "__main__":
    main()
