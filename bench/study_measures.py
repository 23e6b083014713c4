"""What the learning study measures of a policy, none of which an arm optimises.

On fresh images at each guidance scale, the same seeds for all arms of a seed: accuracy by the
held-out judge; Frechet distance, precision and recall (k = 3) in that judge's features against the
evaluation split, which nothing learned from; and the mean entropy, in nats, of the distribution
that the tokens were drawn from, which at scale 1 is the policy's own.
"""

from collections.abc import Sequence

import torch

from argrpo.digits.assets import DigitsAssets
from argrpo.digits.dataset import NUM_CLASSES, load_split
from argrpo.digits.evaluation import evaluate_digits
from argrpo.digits.judges import load_judge
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.models.llamagen import LlamaGen
from argrpo.models.loading import load_tokenizer

SCALES = (1.0, 2.0)
BASE_SCALES = (1.0, 1.25, 1.5, 2.0, 3.0)
MEASURES = ("accuracy", "precision", "recall", "frechet", "entropy")

_SLOTS = 250  # images drawn at a time
_SEED_OFFSET = 1_000_000  # away from the seeds of the runs


def measure(
    policy: LlamaGen, assets: DigitsAssets, *, scales: Sequence[float], count: int, seed: int
) -> list[dict[str, float]]:
    """Scores of a policy, one record a guidance scale.

    Args:
        policy: the policy.
        assets: the tokenizer and the held-out judge.
        scales: guidance scales.
        count: images at each, all digits alike.
        seed: of the study; moved away from those of the runs.
    """
    engine = RolloutEngine(policy, max_slots=min(_SLOTS, count))
    tokenizer, judge = load_tokenizer(assets.tokenizer_path), load_judge(assets.heldout_judge_path)
    labels, real = torch.arange(count) % NUM_CLASSES, load_split("evaluation")
    records = []
    for scale in scales:
        drawn = engine.draw(labels, SamplingParams(guidance_scale=scale), seed=seed + _SEED_OFFSET)
        images = tokenizer.decode(drawn.token_ids, decode_batch=128)
        found = evaluate_digits(images, labels, judge, real)
        record = {name: round(getattr(found, name), 5) for name in MEASURES[:-1]}
        record["entropy"] = round(drawn.entropies.mean().item(), 5)
        records.append({"guidance_scale": scale, **record})
    return records
