"""What the rows of the learning study say: means and spreads, and four claims one by one.

    (a)  instance rewards alone raise accuracy, and lower recall and entropy
    (b)  LOO-FID and adaptive entropy keep accuracy within 2 points of (a) and give back at least
         half of the recall that it lost
    (c)  after tuning, samples without guidance are at least as good in Frechet distance as the
         base's at its best guidance
    (d)  the guided policy reaches the same reward in fewer images than the conditional one

Differences are taken within a seed, whose arms are measured on the same random numbers. A spread is
the standard deviation over seeds. A claim holds if the mean and every seed by itself say so, three
at the least; it is not shown if the mean does and a seed does not.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from result_rows import Row
from study_arms import ARMS, BETA, GUIDANCE, WITH_LOOFID

MOST_ACCURACY_LOST = 0.02
LEAST_RECALL_REGAINED = 0.5
LEAST_SEEDS = 3
WINDOW = 8
"""Steps that a reward is averaged over before it is compared; one step's is too noisy."""

CANDIDATES = (0.5, 2.0)
"""Weights of LOO-FID that the arms may take; the last, as released, where none was tried."""
_TARGETS = (0.5, 0.9)  # of the way that the conditional arm's reward goes


def score(row: Row, measure: str, scale: float) -> float:
    """A measure of a row at a guidance scale.

    Raises:
        ValueError: the row was not measured at that scale.
    """
    for record in row["scores"]:
        if record["guidance_scale"] == scale:
            return float(record[measure])
    raise ValueError(f"scale: expected one that {row['arm']} was measured at, got {scale:g}")


def chosen_weight(rows: Sequence[Row]) -> float:
    """The weight of LOO-FID for the arms: the largest recall among those tried on the first seed
    that keep accuracy within 2 points of the judge alone; where none does, the one that keeps most.
    """
    frontier = frontier_rows(rows)
    judge = [score(row, "accuracy", GUIDANCE) for row in frontier if row["arm"] == "judge"]
    # Weights that came later, for the picture alone, are no choice any more.
    tried = [row for row in frontier if row["loo_fid_weight"] in CANDIDATES]
    if not judge or not tried:
        return CANDIDATES[-1]
    floor = judge[0] - MOST_ACCURACY_LOST
    keeping = [row for row in tried if score(row, "accuracy", GUIDANCE) >= floor]
    wanted = "recall" if keeping else "accuracy"
    best = max(keeping or tried, key=lambda row: score(row, wanted, GUIDANCE))
    return float(best["loo_fid_weight"])


def usual_rows(rows: Sequence[Row]) -> list[Row]:
    """Those of the arms' budget and KL, without the longer runs."""
    steps = min((row["steps"] for row in rows), default=0)
    return [row for row in rows if row["steps"] == steps and row["beta"] == BETA]


def frontier_rows(rows: Sequence[Row]) -> list[Row]:
    """The judge alone and with LOO-FID at every weight, on the first seed, by weight."""
    rows = usual_rows(rows)
    first = min((row["seed"] for row in rows), default=0)
    own = [r for r in rows if r["seed"] == first and r["arm"] in ("judge", "judge_loofid")]
    return sorted(own, key=lambda row: (row["arm"] != "judge", row["loo_fid_weight"]))


def by_arm(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """The rows of the arms by arm and seed, of LOO-FID's those with the chosen weight."""
    arms: dict[str, dict[int, Row]] = {arm: {} for arm in ARMS}
    chosen = chosen_weight(rows)
    for row in usual_rows(rows):
        if row["arm"] not in WITH_LOOFID or row["loo_fid_weight"] == chosen:
            arms[row["arm"]][row["seed"]] = row
    return {arm: seeds for arm, seeds in arms.items() if seeds}


def longer_runs(rows: Sequence[Row]) -> dict[tuple[int, float], dict[str, dict[int, Row]]]:
    """By images drawn and weight of the KL: the longer runs as arms, beside the base; of LOO-FID's
    those with the weight of the arms."""
    usual, chosen = usual_rows(rows), chosen_weight(rows)
    base = {row["seed"]: row for row in usual if row["arm"] == "base"}
    found: dict[tuple[int, float], dict[str, dict[int, Row]]] = {}
    for row in rows:
        if row not in usual and row["loo_fid_weight"] in (0.0, chosen):
            arms = found.setdefault((row["images"], row["beta"]), {"base": {}})
            arms.setdefault(row["arm"], {})[row["seed"]] = row
            if row["seed"] in base:
                arms["base"][row["seed"]] = base[row["seed"]]
    return found


def longer_frontier(rows: Sequence[Row], images: int, beta: float) -> list[Row]:
    """The longer runs of the first seed at one weight of the KL, by the weight of LOO-FID."""
    first = min((row["seed"] for row in rows), default=0)
    wanted = {"seed": first, "images": images, "beta": beta}
    own = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return sorted(own, key=lambda row: (row["arm"] != "judge", row["loo_fid_weight"]))


def images_to_reach(rewards: Sequence[float], target: float, images_per_step: int) -> float:
    """Images drawn until the mean reward of `WINDOW` steps is at least `target`; inf: never."""
    for last in range(WINDOW, len(rewards) + 1):
        if mean(rewards[last - WINDOW : last]) >= target:
            return float(last * images_per_step)
    return math.inf


def claims(arms: Mapping[str, Mapping[int, Row]]) -> list[str]:
    """One paragraph a claim; one whose arms have no row says so."""
    return [*claims_on_rewards(arms), *_claim_c(arms), _claim_d(arms)]


def claims_on_rewards(arms: Mapping[str, Mapping[int, Row]]) -> list[str]:
    """Claims (a) and (b)."""
    return [_claim_a(arms), _claim_b(arms)]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation in words; one value has no spread."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def _shared(arms: Mapping[str, Mapping[int, Row]], *names: str) -> list[int]:
    """Seeds of which all of these arms have a row."""
    return sorted(set.intersection(*(set(arms.get(name, {})) for name in names)))


def _verdict(by_mean: bool, by_seed: Sequence[bool]) -> str:
    shown = "holds" if len(by_seed) >= LEAST_SEEDS else "points that way"
    verdict = (shown if all(by_seed) else "is not shown") if by_mean else "does not hold"
    return f"{verdict} ({sum(by_seed)} of {len(by_seed)} seeds)"


def _claim_a(arms: Mapping[str, Mapping[int, Row]]) -> str:
    seeds = _shared(arms, "base", "judge")
    if not seeds:
        return "**(a)** not measured."
    parts, verdicts = [], []
    for scale in (GUIDANCE, 1.0):
        changes = {
            name: [
                score(arms["judge"][s], name, scale) - score(arms["base"][s], name, scale)
                for s in seeds
            ]
            for name in ("accuracy", "recall", "entropy")
        }
        signs = {"accuracy": 1, "recall": -1, "entropy": -1}
        by_seed = [all(signs[n] * v[i] > 0 for n, v in changes.items()) for i in range(len(seeds))]
        by_mean = all(signs[n] * mean(v) > 0 for n, v in changes.items())
        verdicts.append(f"at guidance {scale:g} it {_verdict(by_mean, by_seed)}")
        told = ", ".join(f"{name} {spread(values)}" for name, values in changes.items())
        parts.append(f"judge minus base at guidance {scale:g}: {told}")
    return f"**(a)** {'; '.join(verdicts)}. {'; '.join(parts)}."


def _claim_b(arms: Mapping[str, Mapping[int, Row]]) -> str:
    seeds = _shared(arms, "base", "judge", "judge_loofid")
    if not seeds:
        return "**(b)** not measured."
    parts = []
    for scale in (GUIDANCE, 1.0):
        base, judge, both = (
            {n: [score(arms[a][s], n, scale) for s in seeds] for n in ("accuracy", "recall")}
            for a in ("base", "judge", "judge_loofid")
        )
        kept = [x - y for x, y in zip(both["accuracy"], judge["accuracy"], strict=True)]
        lost = [x - y for x, y in zip(base["recall"], judge["recall"], strict=True)]
        regained = [x - y for x, y in zip(both["recall"], judge["recall"], strict=True)]
        by_seed = [_gives_back(*three) for three in zip(kept, lost, regained, strict=True)]
        by_mean = _gives_back(mean(kept), mean(lost), mean(regained))
        share = f"{mean(regained) / mean(lost):.0%} of it" if mean(lost) > 0 else "none was lost"
        parts.append(
            f"at guidance {scale:g} it {_verdict(by_mean, by_seed)}: accuracy against judge "
            f"{spread(kept)}, recall lost by judge {spread(lost)}, given back {spread(regained)}, "
            f"{share}"
        )
    weight = arms["judge_loofid"][seeds[0]]["loo_fid_weight"]
    return f"**(b)** with weight {weight:g}: {'; '.join(parts)}."


def _gives_back(kept: float, lost: float, regained: float) -> bool:
    return kept >= -MOST_ACCURACY_LOST and lost > 0 and regained >= LEAST_RECALL_REGAINED * lost


def best_base_scale(base: Sequence[Row]) -> float:
    """The guidance scale at which the base's mean Frechet distance is least."""
    scales = [record["guidance_scale"] for record in base[0]["scores"]]
    return min(scales, key=lambda scale: mean(score(row, "frechet", scale) for row in base))


def _claim_c(arms: Mapping[str, Mapping[int, Row]]) -> list[str]:
    told = []
    for arm in ("judge", *WITH_LOOFID):
        seeds = _shared(arms, "base", arm)
        if not seeds:
            told.append(f"**(c)** {arm}: not measured.")
            continue
        best = best_base_scale([arms["base"][s] for s in seeds])
        base = [score(arms["base"][s], "frechet", best) for s in seeds]
        tuned = [score(arms[arm][s], "frechet", 1.0) for s in seeds]
        by_seed = [ours <= its for ours, its in zip(tuned, base, strict=True)]
        told.append(
            f"**(c)** {arm} {_verdict(mean(tuned) <= mean(base), by_seed)}: Frechet distance "
            f"{spread(tuned, 1)} without guidance, the base's {spread(base, 1)} at its best "
            f"guidance {best:g}."
        )
    return told


def _claim_d(arms: Mapping[str, Mapping[int, Row]]) -> str:
    seeds = _shared(arms, "judge", "guided")
    if not seeds:
        return "**(d)** not measured."
    parts = []
    for share in _TARGETS:
        pairs = [_images_of_pair(arms["judge"][s], arms["guided"][s], share) for s in seeds]
        told = ", ".join(f"{_counted(ours)} against {_counted(its)}" for its, ours in pairs)
        sooner = [ours < its for its, ours in pairs]
        by_mean = mean(ours for _, ours in pairs) < mean(its for its, _ in pairs)
        parts.append(f"for {share:.0%} of the way it {_verdict(by_mean, sooner)}: {told}")
    ahead = [
        mean(arms["guided"][s]["curves"]["reward"]) - mean(arms["judge"][s]["curves"]["reward"])
        for s in seeds
    ]
    return (
        f"**(d)** {'; '.join(parts)} images, guided against judge, by seed. The way is that of "
        f"judge's reward from its first to its last {WINDOW} steps. Over all steps the reward of "
        f"guided was ahead by {spread(ahead)}."
    )


def _images_of_pair(judge: Row, guided: Row, share: float) -> tuple[float, float]:
    rewards = judge["curves"]["reward"]
    first, last = mean(rewards[:WINDOW]), mean(rewards[-WINDOW:])
    target, each = first + share * (last - first), judge["images"] // judge["steps"]
    return tuple(images_to_reach(row["curves"]["reward"], target, each) for row in (judge, guided))  # type: ignore[return-value]


def _counted(images: float) -> str:
    return f"{images:,.0f}" if math.isfinite(images) else "never"
