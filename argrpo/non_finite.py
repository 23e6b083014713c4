"""Optimizer steps that were refused because a loss or a gradient is no finite number.

The guard itself is on the device: a loss that is not finite makes the gradient so, and the norm of
the gradient, which the host reads once an optimizer step anyway, decides. Weights and moments stay
as they were.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from argrpo.data import Prompt
from argrpo.engine.rollout import Rollout
from argrpo.ranks import own_rank
from argrpo.run_folder import RunFolder, write_atomically


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not a finite number; the weights are those of the step before."""


class RefusedUpdate(NamedTuple):
    """An optimizer step that did not happen."""

    rows: Tensor  # [n] int64, its images among those of the step
    grad_norm: float


def dump_refused(
    folder: RunFolder,
    step: int,
    refused: Sequence[RefusedUpdate],
    rollout: Rollout,
    scores: Mapping[str, Tensor],
    prompts: Sequence[Prompt],
) -> None:
    """Leave what such optimizer steps were made of in the folder of the run.

    non_finite/step_000012.json says which images, prompts, seed and scores; a safetensors file
    beside it has their tokens and log-probs.

    Args:
        folder: of the run.
        step: counted from 1.
        refused: the optimizer steps of this step that did not happen; at least one.
        rollout: this rank's images of the step, n of them.
        scores: [N] of all ranks' images, by judge.
        prompts: [n], one an image.

    Raises:
        StorageError: the disk is full or refused.
    """
    rows = torch.cat([update.rows for update in refused]).unique()
    record = {
        "step": step,
        # As words, because JSON has no NaN.
        "grad_norms": [repr(update.grad_norm) for update in refused],
        "seed": rollout.seed,
        "images": [
            {
                "image_id": int(rollout.image_ids[row]),
                "prompt_id": prompts[row].prompt_id,
                "class_id": prompts[row].class_id,
                "text": prompts[row].text,
                "scores": {
                    name: repr(float(column[rollout.image_ids[row]]))
                    for name, column in scores.items()
                },
            }
            for row in rows.tolist()
        ],
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    tensors = {
        "image_ids": rollout.image_ids[rows],
        "token_ids": rollout.token_ids[rows],
        "logprobs": rollout.logprobs[rows],
    }
    rank = f"_rank_{own_rank()}" if own_rank() else ""
    stem = folder.path / "non_finite" / f"step_{step:06d}{rank}"
    write_atomically(stem.with_suffix(".safetensors"), lambda part: save_file(tensors, part))
    write_atomically(stem.with_suffix(".json"), lambda part: part.write_text(text))
