"""What a run reads first: prompts, policy and tokenizer, checked against each other."""

from typing import NamedTuple

import torch

from argrpo.config import TrainConfig
from argrpo.data import PromptSet
from argrpo.devices import DTYPES
from argrpo.model_paths import blamed_on, resolve_path
from argrpo.models.image_policy import ImagePolicy
from argrpo.models.loading import load_policy, load_tokenizer
from argrpo.models.pairing import (
    check_first_token_mask,
    check_guidance,
    check_label_dropout,
    check_pair,
)
from argrpo.models.text_layout import text_layout
from argrpo.models.vq import VQTokenizer
from argrpo.progress import Report
from argrpo.rank_checks import check_alike
from argrpo.ranks import node_leader_first
from argrpo.resuming import Start
from argrpo.run_prompts import load_run_prompts


class RunModels(NamedTuple):
    """What draws and what it draws for."""

    policy: ImagePolicy
    tokenizer: VQTokenizer
    prompts: PromptSet


def load_models(
    config: TrainConfig, device: torch.device, start: Start | None, report: Report
) -> RunModels:
    """Read them, the policy from the checkpoint where a run goes on.

    Args:
        config: the run.
        device: where the models go.
        start: the checkpoint; None begins at `config.policy`.
        report: told ("texts", encoded so far, in all) while prompts are encoded.

    Raises:
        ValueError: a file or a setting that does not fit the others, named.
        FileNotFoundError: a path that is not there.
        PeerError: another rank failed, or read other weights.
    """
    wanted = config.policy
    blamed = "policy.path" if start is None else "resume"
    path = resolve_path(wanted.path, config.cache_dir) if start is None else start.path
    with blamed_on(blamed, sizes="policy."):
        layout = text_layout(path, text_padding=wanted.text_padding)
    # Before the policy, so that an encoder of texts is gone when the policy comes.
    with node_leader_first("texts"):
        prompts = load_run_prompts(
            config.data, layout, device=device, cache_dir=config.cache_dir, report=report
        )
    with blamed_on(blamed, sizes="policy."):
        policy = load_policy(
            path,
            # A checkpoint says of itself what a published file may not.
            image_size=wanted.image_size if start is None else None,
            num_heads=wanted.num_heads if start is None else None,
            downsample=wanted.downsample,
            text_padding=wanted.text_padding,
            device=device,
            dtype=DTYPES[wanted.dtype],
        )
    with blamed_on("tokenizer.path"):
        tokenizer = load_tokenizer(
            resolve_path(config.tokenizer.path, config.cache_dir),
            device=device,
            dtype=DTYPES[config.tokenizer.dtype],
        )
    check_pair(policy, tokenizer)
    check_guidance(policy, "rollout.guidance_scale", config.rollout.guidance_scale)
    check_label_dropout(policy, config.parity.label_dropout)
    check_first_token_mask(policy, config.parity.first_token_mask)
    check_alike(config, policy)
    policy.check_conditions(prompts.probe())
    return RunModels(policy, tokenizer, prompts)
