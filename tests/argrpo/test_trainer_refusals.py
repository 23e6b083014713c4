"""What the trainer refuses before a run, and what neither ends a run nor moves the weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_tokenizer import write_tokenizer
from torch import Tensor
from trainer_runs import brighter_left, config_of, run, write_run_models

from argrpo.config import DataConfig, TokenizerConfig
from argrpo.data import Prompt
from argrpo.devices import choose_device
from argrpo.models.loading import load_policy
from argrpo.non_finite import NonFiniteError
from argrpo.trainer import Trainer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_models(tmp_path_factory.mktemp("models"))


def sometimes_missing(images: Tensor, prompts: list[Prompt]) -> Tensor:
    scores = brighter_left(images, prompts)
    scores[::3] = torch.nan
    return scores


def never_scored(images: Tensor, prompts: list[Prompt]) -> Tensor:
    return torch.full((len(prompts),), torch.nan)


def infinite(images: Tensor, prompts: list[Prompt]) -> Tensor:
    return brighter_left(images, prompts) / 0


def wrong_shape(images: Tensor, prompts: list[Prompt]) -> Tensor:
    return brighter_left(images, prompts)[:-1]


def test_images_that_a_judge_did_not_score_are_left_out(models: Path, tmp_path: Path) -> None:
    _, recorder = run(config_of(models, f"{__name__}:sometimes_missing"), tmp_path / "run")
    assert all(value == value for row in recorder.rows for value in row.values())
    assert recorder.rows[0]["grad_norm"] > 0


def test_a_step_without_a_single_score_moves_nothing(models: Path, tmp_path: Path) -> None:
    trainer, recorder = run(config_of(models, f"{__name__}:never_scored"), tmp_path / "run")
    base = load_policy(models / "policy")
    assert torch.equal(trainer.policy.head_weight, base.head_weight)
    assert recorder.rows[-1]["optimizer_step"] == 0


def test_a_prompt_that_the_policy_cannot_draw_is_refused_before_the_first_step(
    models: Path, tmp_path: Path
) -> None:
    config = replace(config_of(models), data=DataConfig(names="imagenet"))
    with pytest.raises(ValueError, match="labels: expected 0 to 9, got 10"):
        Trainer(replace(config, output_dir=str(tmp_path / "run")), [])
    assert not (tmp_path / "run").exists()


def test_scores_of_another_shape_are_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected scores of shape \[16\], got \[15\]"):
        run(config_of(models, f"{__name__}:wrong_shape"), tmp_path / "run")


def test_infinite_scores_are_failures_and_move_nothing(models: Path, tmp_path: Path) -> None:
    trainer, recorder = run(config_of(models, f"{__name__}:infinite"), tmp_path / "run")
    name = f"rewards/{__name__}:infinite/failures"
    assert [row[name] for row in recorder.rows] == [16, 16]
    before = load_policy(models / "policy").state_dict()
    for key, value in trainer.policy.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(
    models: Path, tmp_path: Path
) -> None:
    config = config_of(models)
    trainer = Trainer(replace(config, output_dir=str(tmp_path / "run")), [])
    before = trainer.policy.head_weight.detach().clone()
    trainer.policy.norm.weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(NonFiniteError, match="grad_norm: expected a finite number at step 1"):
        trainer.train()
    assert torch.equal(trainer.policy.head_weight, before)


def test_a_tokenizer_of_another_grid_or_codebook_is_refused(models: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    write_tokenizer(other, codebook_size=64)
    config = replace(config_of(models), tokenizer=TokenizerConfig(path=str(other)))
    with pytest.raises(ValueError, match="expected a codebook of 32, as the policy has, got 64"):
        Trainer(replace(config, output_dir=str(tmp_path / "run")), [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="device: expected a CUDA GPU, got none"):
        choose_device("cuda")


def test_a_bound_on_the_cache_reaches_the_engine(models: Path, tmp_path: Path) -> None:
    config = replace(config_of(models), kv_bytes=1)
    with pytest.raises(ValueError, match=r"kv_bytes: expected at least .* for one guided image"):
        Trainer(replace(config, output_dir=str(tmp_path / "none")), [])
    roomy = Trainer(replace(config, output_dir=str(tmp_path / "some"), kv_bytes=10**9), [])
    assert roomy.engine.num_slots == config.images_per_step
