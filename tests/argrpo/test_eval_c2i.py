"""`argrpo eval c2i` on a random policy of digits' size: images, sharing, going on, numbers."""

import json
import multiprocessing
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from argrpo import eval_c2i
from argrpo.digits.dataset import load_split
from argrpo.digits.judges import DigitJudge, load_judge, save_judge
from argrpo.drawing_models import load_models
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.eval_c2i import C2iResults, classes_of, evaluate_classes
from argrpo.eval_c2i_config import C2iConfig, resolved
from argrpo.evaluation import image_set
from argrpo.evaluation.diversity import distance_within
from argrpo.evaluation.frechet import frechet_distance
from argrpo.evaluation.image_set import DrawnBatch
from argrpo.evaluation.image_source import ImageSource
from argrpo.evaluation.inception_score import inception_score
from argrpo.evaluation.precision_recall import neighbourhoods
from argrpo.evaluation.sample_files import read_samples
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import load_policy, load_tokenizer, save_policy, save_tokenizer
from argrpo.models.vq import VQConfig, VQTokenizer
from argrpo.pixels import to_uint8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies of 8 x 8 tokens, their tokenizer, and a judge of digits."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 32, "vocab_size": 32}
    grid = {"image_size": 32, "downsample": 4, "num_classes": 10}
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        policy = LlamaGen(LlamaGenConfig(**sizes, **grid))
        with torch.no_grad():
            # A fresh head is 0: every token would be as likely, whatever the guidance.
            nn.init.normal_(policy.head_weight, std=0.5)
        save_policy(policy, folder / name)
    codes = {"codebook_size": 32, "codebook_dim": 8, "z_channels": 32, "channels": 32}
    small = {"encoder_multipliers": (1, 1, 1), "decoder_multipliers": (1, 1, 1)}
    save_tokenizer(VQTokenizer(VQConfig(**codes, **small, num_res_blocks=1)), folder / "tokenizer")
    save_judge(DigitJudge(width=2, feature_dim=8), folder / "judge")
    return folder


def config_of(models: Path, output_dir: Path) -> C2iConfig:
    return C2iConfig(
        policy=str(models / "base"),
        tokenizer=str(models / "tokenizer"),
        num_heads=2,
        num_images=44,
        batch=8,
        seed=3,
        top_k=20,
        guidance_scales=[2.0],
        features="digits_judge",
        features_path=str(models / "judge"),
        reference="dataset:digits/evaluation",
        device="cpu",
        output_dir=str(output_dir),
    )


@pytest.fixture
def config(models: Path, tmp_path: Path) -> C2iConfig:
    return config_of(models, tmp_path / "out")


def samples_of(config: C2iConfig, policy: str = "base", scale: str = "2") -> Path:
    return Path(config.output_dir) / policy / f"guidance_{scale}" / "samples.npz"


def measured(config: C2iConfig) -> C2iResults:
    results = evaluate_classes(config)
    assert results is not None
    return results


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[C2iResults, Path]:
    """What one process makes of `config`, and its images."""
    config = config_of(models, tmp_path_factory.mktemp("whole"))
    return measured(config), samples_of(config)


def drawn_by_hand(config: C2iConfig, models: Path) -> Tensor:
    """[N, 3, 32, 32] in [0, 1] after the 8 bits of a file."""
    engine = RolloutEngine(load_policy(models / "base", num_heads=2), max_slots=8)
    params = SamplingParams(guidance_scale=2.0, top_k=20)
    rollout = engine.draw(torch.arange(44) % 10, params, seed=3)
    tokens = rollout.token_ids.split(8)
    images = torch.cat([load_tokenizer(models / "tokenizer").decode(part) for part in tokens])
    return to_uint8(images).float() / 255.0


def test_the_file_holds_the_images_that_the_engine_draws_and_their_classes(
    config: C2iConfig, models: Path, whole: tuple[C2iResults, Path]
) -> None:
    with np.load(whole[1]) as file:
        assert set(file.files) == {"arr_0", "arr_1", "entropies"}
        pixels, labels = file["arr_0"], file["arr_1"]
    assert (pixels.shape, pixels.dtype) == ((44, 32, 32, 3), np.uint8)
    wanted = (255.0 * drawn_by_hand(config, models)).round().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pixels, wanted)
    assert np.array_equal(labels, np.arange(44) % 10)
    assert not (whole[1].parent / "batches").exists()


def test_numbers_are_those_of_the_functions_that_measure(
    config: C2iConfig, models: Path, whole: tuple[C2iResults, Path]
) -> None:
    row = dict(whole[0].rows[0])
    judge, labels = load_judge(models / "judge"), torch.arange(44) % 10
    images, references = drawn_by_hand(config, models), load_split("evaluation").images
    features, real = judge.features(images), judge.features(references)
    # batches of 8 against all at once
    close = {"rel": 1e-4}
    assert row.pop("frechet") == pytest.approx(frechet_distance(features, real), **close)
    for name, value in neighbourhoods(features, real)._asdict().items():
        assert row.pop(name) == pytest.approx(value, abs=1e-9), name
    with torch.no_grad():
        score = inception_score(judge(images))
    assert row.pop("inception_score") == pytest.approx(score.mean, **close)
    assert row.pop("inception_score_std") == pytest.approx(score.std, rel=1e-2)
    hits = (judge.predict(images) == labels).double().mean().item()
    assert row.pop("accuracy") == hits
    assert row.pop("pairwise_distance") == pytest.approx(distance_within(features, labels), **close)
    assert 0 < row.pop("entropy") < np.log(20)
    assert row == {"policy": "base", "guidance_scale": 2.0}


def test_three_shards_make_the_same_bytes_and_numbers_as_one_process(
    config: C2iConfig, whole: tuple[C2iResults, Path]
) -> None:
    shards = [replace(config, shard=shard, num_shards=3) for shard in (2, 0, 1)]
    found = [evaluate_classes(shard) for shard in shards]
    assert found[:2] == [None, None], "the last to finish measures"
    assert found[2] is not None
    assert found[2].rows == whole[0].rows
    assert samples_of(config).read_bytes() == whole[1].read_bytes()


def _evaluated(config: C2iConfig) -> C2iResults | None:
    return evaluate_classes(config)


def test_two_ranks_make_the_same_bytes_and_numbers_as_one_process(
    config: C2iConfig, whole: tuple[C2iResults, Path], run_ranks: Callable
) -> None:
    first, second = run_ranks(2, _evaluated, config)
    assert first.result.rows == whole[0].rows
    assert second.result is None, "the first speaks for all"
    assert samples_of(config).read_bytes() == whole[1].read_bytes()


def test_what_was_killed_goes_on_and_makes_the_same_bytes(
    config: C2iConfig, whole: tuple[C2iResults, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _killed_while_writing(config, batch=2)
    kept = sorted((samples_of(config).parent / "batches").glob("0*.safetensors"))
    assert [path.stem for path in kept] == ["000000", "000001"]
    times = [path.stat().st_mtime_ns for path in kept]
    drawn: list[range] = []
    draw = ImageSource.draw

    def counted(source: ImageSource, rows: range, params: SamplingParams) -> DrawnBatch:
        drawn.append(rows)
        return draw(source, rows, params)

    monkeypatch.setattr(ImageSource, "draw", counted)
    # Batches stay where they are, to be looked at.
    monkeypatch.setattr("argrpo.evaluation.image_set.shutil.rmtree", lambda *_, **__: None)
    results = measured(config)
    assert drawn == [range(16, 24), range(24, 32), range(32, 40), range(40, 44)]
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert results.rows == whole[0].rows
    assert samples_of(config).read_bytes() == whole[1].read_bytes()


def _killed_while_writing(config: C2iConfig, batch: int) -> None:
    """What a process leaves that is killed without warning in the middle of a file."""

    def write_some(tensors: dict[str, Tensor], path: Path) -> None:
        if path.parent.name == "batches" and f"{batch:06d}" in path.name:
            path.write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        save_file(tensors, path)

    def run() -> None:
        image_set.save_file = write_some
        evaluate_classes(config)

    # Forked, so that nothing is imported again.
    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL


def test_more_images_leave_the_first_ones_as_they_are(
    config: C2iConfig, whole: tuple[C2iResults, Path]
) -> None:
    measured(replace(config, num_images=48))
    with np.load(samples_of(config)) as more:
        again = more["arr_0"][:44]
    with np.load(whole[1]) as file:
        assert np.array_equal(again, file["arr_0"])


def test_another_network_looks_at_a_finished_set_in_one_pass(
    config: C2iConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(config, num_images=24)
    measured(small)
    torch.manual_seed(1)
    save_judge(DigitJudge(width=2, feature_dim=8), tmp_path / "judge")
    other = replace(small, features_path=str(tmp_path / "judge"))
    reads = []

    def counted(path: Path, batch: int) -> Iterator[Tensor]:
        reads.append(path)
        return read_samples(path, batch)

    monkeypatch.setattr(image_set, "read_samples", counted)
    monkeypatch.setattr(ImageSource, "draw", lambda *_, **__: pytest.fail("drawn again"))
    rows = measured(other).rows
    assert reads == [samples_of(small)]
    monkeypatch.undo()
    assert measured(replace(other, output_dir=str(tmp_path / "fresh"))).rows == rows


def test_a_comparison_tells_each_policys_best_guidance(config: C2iConfig, models: Path) -> None:
    both = [str(models / "base"), str(models / "tuned")]
    compared = replace(config, policy=None, compare=both, guidance_scales=[1.0, 3.0], num_images=24)
    results = measured(compared)
    asked = [(row["policy"], row["guidance_scale"]) for row in results.rows]
    assert asked == [("base", 1.0), ("base", 3.0), ("tuned", 1.0), ("tuned", 3.0)]
    for name in ("base", "tuned"):
        own = {row["frechet"]: row for row in results.rows if row["policy"] == name}
        assert len(own) == 2
        assert results.best[name] == own[min(own)]
    # The same images again, another question.
    by_accuracy = measured(replace(compared, best_by="entropy"))
    for name in ("base", "tuned"):
        own = {row["entropy"]: row for row in results.rows if row["policy"] == name}
        assert by_accuracy.best[name] == own[max(own)]
    kept = json.loads((Path(config.output_dir) / "results.json").read_text())
    assert kept["rows"] == results.rows
    assert kept["settings"]["best_by"] == "entropy"


def test_a_policy_is_gone_before_the_next_one_is_read(
    config: C2iConfig, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies: list[weakref.ref[nn.Module]] = []

    def watched(*args: object, setting: str) -> tuple[nn.Module, VQTokenizer]:
        assert [policy for policy in policies if policy() is not None] == []
        policy, tokenizer = load_models(*args, setting=setting)
        policies.append(weakref.ref(policy))
        return policy, tokenizer

    monkeypatch.setattr(eval_c2i, "load_models", watched)
    both = [str(models / "base"), str(models / "tuned")]
    measured(replace(config, policy=None, compare=both, num_images=8, neighbours=0))
    assert len(policies) == 2


def test_images_of_other_settings_are_never_mixed(config: C2iConfig, models: Path) -> None:
    small = replace(config, num_images=8, neighbours=0)
    measured(small)
    for change, name in (
        ({"seed": 4}, "seed is 3 and not 4"),
        ({"top_k": 0}, "sampling is"),
        ({"batch": 4}, "batch is 8 and not 4"),
        ({"labels": [1, 2]}, "conditions is"),
        ({"pixels": "truncate"}, "pixels is llamagen and not truncate"),
    ):
        with pytest.raises(ValueError, match=f"output_dir: expected a folder .*, whose {name}"):
            evaluate_classes(replace(small, **change))
    save_policy(load_policy(models / "tuned", num_heads=2), models / "elsewhere" / "base")
    with pytest.raises(ValueError, match=r"output_dir: expected a folder .*, whose policy is"):
        evaluate_classes(replace(small, policy=str(models / "elsewhere" / "base")))


def test_random_classes_go_by_image_and_are_even(config: C2iConfig) -> None:
    uniform = replace(config, classes="uniform", num_images=5000)
    labels = classes_of(uniform, 10)
    assert torch.equal(classes_of(replace(uniform, num_images=50), 10), labels[:50])
    assert not torch.equal(classes_of(replace(uniform, seed=4), 10), labels)
    # 500 each expected; six standard deviations
    assert (labels.bincount(minlength=10) - 500).abs().max() < 6 * 450**0.5
    chosen = replace(config, names=["seven", "two"], names_from="digits", num_images=5)
    assert classes_of(chosen, 10).tolist() == [7, 2, 7, 2, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"names": ["sevn"], "names_from": "digits"},
            "names: expected a class of digits, got 'sevn'",
        ),
        ({"labels": [3, 10]}, "labels: expected 0 to 9, as the policy knows, got 10"),
        ({"policy": "nowhere"}, "policy: nowhere: expected a checkpoint"),
        ({"features_path": "nowhere"}, "features_path: judge: expected a folder"),
        ({"reference": "nowhere.npz"}, "reference: expected an npz file or a folder of images"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    config: C2iConfig, change: dict[str, object], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate_classes(replace(config, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compare": ["a", "b"]}, "policy: expected either policy or compare, got both"),
        ({"policy": None}, "policy: expected either policy or compare, got neither"),
        ({"shard": 3, "num_shards": 3}, "shard: expected 0 to num_shards - 1 = 2, got 3"),
        ({"guidance_scales": [2.0, 0.5]}, "guidance_scales: expected finite numbers of at least 1"),
        ({"guidance_scales": [2.0, 2.0]}, "guidance_scales: expected each once"),
        ({"num_images": 3}, "num_images: expected at least 4, got 3"),
        ({"reference": None}, "reference: expected images or moments"),
        ({"features_path": None}, "features_path: expected weights of digits_judge"),
        ({"best_by": "fid"}, "best_by: expected one of frechet, .* got fid"),
        ({"labels": [1], "names": ["one"]}, "labels: expected labels or names, got both"),
    ],
)
def test_settings_are_refused_by_name(
    config: C2iConfig, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_policies_that_read_texts_are_refused_before_a_draw(
    config: C2iConfig, tmp_path: Path
) -> None:
    sizes = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 32, "vocab_size": 32}
    grid = {"image_size": 32, "downsample": 4, "caption_dim": 8, "prefix_len": 5}
    save_policy(LlamaGen(LlamaGenConfig(**sizes, **grid, model_type="t2i")), tmp_path / "text")
    with pytest.raises(ValueError, match=r"expected class-conditional policies, .* reads texts"):
        evaluate_classes(replace(config, policy=str(tmp_path / "text")))


def test_names_from_digits_takes_the_embedded_judge_and_reference(config: C2iConfig) -> None:
    bare = replace(config, features_path=None, reference=None, names_from="digits")
    found = resolved(bare)
    assert (found.features, found.features_path) == ("digits_judge", "digits:heldout_judge")
    assert found.reference == "dataset:digits/evaluation"
    assert resolved(config) == config


def test_policies_of_one_name_are_numbered(config: C2iConfig) -> None:
    both = replace(config, policy=None, compare=["a/best", "b/best", "x.pt"])
    assert both.policies == {"best_1": "a/best", "best_2": "b/best", "x": "x.pt"}
    numbered = replace(config, policy=None, compare=["best_2", "a/best", "b/best"])
    assert numbered.policies == {"1_best_2": "best_2", "2_best": "a/best", "3_best": "b/best"}
