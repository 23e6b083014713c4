"""`argrpo eval t2i` on random text-conditional policies: images, judges, wins and the page."""

import html
import json
import math
import re
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from argrpo import eval_t2i
from argrpo.data import Prompt
from argrpo.data_config import DataConfig
from argrpo.drawing_models import load_models
from argrpo.engine.conditions import TextFeatures
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.eval_t2i import T2iResults, evaluate_texts
from argrpo.eval_t2i_config import T2iConfig
from argrpo.evaluation.diversity import distance_within, thumbnails
from argrpo.evaluation.judge_panel import win_rate, win_rate_error
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import load_policy, load_tokenizer, save_policy, save_tokenizer
from argrpo.models.vq import VQConfig, VQTokenizer
from argrpo.pixels import to_uint8
from argrpo.reward_config import RewardConfig
from argrpo.side_by_side import write_side_by_side
from argrpo.text_config import TextEncoderConfig

TEXTS = ["a cat", "a <b>dog</b> & co", "a hat"]
LEFT = f"{__name__}:brighter_left"


def brighter_left(images: Tensor, prompts: list[Prompt]) -> Tensor:
    """How much brighter the left half is; nothing is said of hats."""
    half = images.shape[3] // 2
    gap = images[..., :half].mean(dim=(1, 2, 3)) - images[..., half:].mean(dim=(1, 2, 3))
    return torch.where(torch.tensor(["hat" in p.text for p in prompts]), torch.nan, gap)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two text policies of 4 x 4 tokens, their tokenizer, features of three texts."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 32, "vocab_size": 32}
    grid = {"image_size": 16, "downsample": 4, "caption_dim": 8, "prefix_len": 5}
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        policy = LlamaGen(LlamaGenConfig(**sizes, **grid, model_type="t2i"))
        with torch.no_grad():
            nn.init.normal_(policy.head_weight, std=0.5)  # a fresh head is 0
        save_policy(policy, folder / name)
    codes = {"codebook_size": 32, "codebook_dim": 8, "z_channels": 32, "channels": 32}
    small = {"encoder_multipliers": (1, 1, 1), "decoder_multipliers": (1, 1, 1)}
    save_tokenizer(VQTokenizer(VQConfig(**codes, **small, num_res_blocks=1)), folder / "tokenizer")
    features = {"features": torch.randn(3, 5, 8), "mask": torch.ones(3, 5, dtype=torch.int64)}
    metadata = {"prompts": json.dumps(TEXTS)}
    save_file(features, folder / "prompts.safetensors", metadata=metadata)
    lines = [json.dumps({"tag": "t", "include": [], "prompt": text}) for text in TEXTS]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def config_of(models: Path, output_dir: Path) -> T2iConfig:
    return T2iConfig(
        compare=[str(models / "base"), str(models / "tuned")],
        tokenizer=str(models / "tokenizer"),
        num_heads=2,
        data=DataConfig(text_features=str(models / "prompts.safetensors")),
        metadata=str(models / "metadata.jsonl"),
        num_images_per_prompt=3,
        guidance_scale=2.0,
        seed=4,
        batch=4,
        judges=[RewardConfig(name=LEFT)],
        device="cpu",
        output_dir=str(output_dir),
    )


def compared(config: T2iConfig) -> T2iResults:
    results = evaluate_texts(config)
    assert results is not None
    return results


@pytest.fixture(scope="module")
def finished(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[T2iResults, Path]:
    folder = tmp_path_factory.mktemp("out")
    return compared(config_of(models, folder)), folder


def drawn_by_hand(models: Path, name: str) -> Tensor:
    """[9, 3, 16, 16] in [0, 1] after the 8 bits of a file; three of each text."""
    from safetensors.torch import load_file

    texts = load_file(models / "prompts.safetensors")
    index = torch.arange(3).repeat_interleave(3)
    conditions = TextFeatures(texts["features"], texts["mask"], index)
    engine = RolloutEngine(load_policy(models / name, num_heads=2), max_slots=4)
    rollout = engine.draw(conditions, SamplingParams(guidance_scale=2.0), seed=4)
    tokenizer = load_tokenizer(models / "tokenizer")
    images = torch.cat([tokenizer.decode(part) for part in rollout.token_ids.split(4)])
    return to_uint8(images).float() / 255.0


@pytest.mark.parametrize("name", ["base", "tuned"])
def test_folders_hold_the_images_that_the_engine_draws(
    finished: tuple[T2iResults, Path], models: Path, name: str
) -> None:
    images = drawn_by_hand(models, name)
    for place, text in enumerate(TEXTS):
        folder = finished[1] / name / "images" / f"{place:05d}"
        record = json.loads((folder / "metadata.jsonl").read_text())
        assert record == {"tag": "t", "include": [], "prompt": text}
        for sample in range(3):
            picture = np.asarray(Image.open(folder / "samples" / f"{sample:04d}.png"))
            wanted = (255.0 * images[3 * place + sample]).round().permute(1, 2, 0)
            assert np.array_equal(picture, wanted.numpy())


def test_judges_wins_and_diversity_are_those_of_the_images(
    finished: tuple[T2iResults, Path], models: Path
) -> None:
    prompts = [Prompt(text) for text in TEXTS for _ in range(3)]
    base, tuned = (drawn_by_hand(models, name) for name in ("base", "tuned"))
    before, after = brighter_left(base, prompts), brighter_left(tuned, prompts)
    rows = finished[0].rows()
    assert [row["policy"] for row in rows] == ["base", "tuned"]
    for row, scores, images in ((rows[0], before, base), (rows[1], after, tuned)):
        # means of 4 images against all at once
        assert row[f"{LEFT}/mean"] == pytest.approx(scores[:6].mean().item(), abs=1e-6)
        assert row[f"{LEFT}/not_scored"] == 3
        groups = torch.arange(3).repeat_interleave(3)
        pixels = distance_within(thumbnails(images), groups)
        assert row["pairwise_pixels"] == pytest.approx(pixels, rel=1e-5)
        assert 0 < row["entropy"] < math.log(32)
    assert f"{LEFT}/win_rate" not in rows[0]
    assert rows[1][f"{LEFT}/win_rate"] == win_rate(after, before)
    kept = json.loads((finished[1] / "results.json").read_text())
    assert kept["rows"] == rows
    assert kept["settings"]["guidance_scale"] == 2.0


def test_scores_of_each_image_are_kept_with_its_file(finished: tuple[T2iResults, Path]) -> None:
    folder = finished[1] / "tuned"
    entries = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [entry["prompt"] for entry in entries] == [text for text in TEXTS for _ in range(3)]
    assert all((folder / entry["file"]).is_file() for entry in entries)
    scores = finished[0].policies[1].scores[:, 0].tolist()
    said = [entry["scores"][LEFT] for entry in entries]
    assert said[:6] == scores[:6]
    assert said[6:] == [None, None, None]


def test_three_shards_make_the_same_images_and_numbers(
    finished: tuple[T2iResults, Path], models: Path, tmp_path: Path
) -> None:
    config = config_of(models, tmp_path)
    found = [evaluate_texts(replace(config, shard=s, num_shards=3)) for s in (1, 2, 0)]
    assert found[:2] == [None, None]
    assert found[2] is not None
    assert found[2].rows() == finished[0].rows()
    for name in ("base", "tuned"):
        one, other = (folder / name / "samples.npz" for folder in (tmp_path, finished[1]))
        assert one.read_bytes() == other.read_bytes()


def test_a_policy_is_gone_before_the_next_one_is_read(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies: list[weakref.ref[nn.Module]] = []

    def watched(*args: object, setting: str) -> tuple[nn.Module, VQTokenizer]:
        assert [policy for policy in policies if policy() is not None] == []
        policy, tokenizer = load_models(*args, setting=setting)
        policies.append(weakref.ref(policy))
        return policy, tokenizer

    monkeypatch.setattr(eval_t2i, "load_models", watched)
    compared(config_of(models, tmp_path))
    assert len(policies) == 2


def test_judging_again_draws_and_asks_nothing_anew(
    finished: tuple[T2iResults, Path], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("argrpo.evaluation.image_source.ImageSource.draw", never)
    monkeypatch.setattr("argrpo.evaluation.judge_panel.scores_of", never)
    assert compared(config_of(models, finished[1])).rows() == finished[0].rows()


def test_a_judge_whose_file_changed_is_asked_again(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    config = replace(
        config_of(models, tmp_path / "out"),
        judges=[RewardConfig(name="judge_of_mine:same")],
        compare=[],
        policy=str(models / "base"),
    )
    for score in (2, 30):  # of another length, so that no compiled file is taken for this one
        source = f"def same(images, prompts):\n    return [{score}.0] * len(prompts)\n"
        (tmp_path / "judge_of_mine.py").write_text(source)
        monkeypatch.delitem(sys.modules, "judge_of_mine", raising=False)
        (row,) = compared(config).rows()
        assert row["judge_of_mine:same/mean"] == score
    monkeypatch.delitem(sys.modules, "judge_of_mine")


def test_prompts_of_a_benchmarks_file_are_read_through_the_encoder(
    models: Path, tiny_t5: Path, tmp_path: Path
) -> None:
    width = json.loads((tiny_t5 / "config.json").read_text())["d_model"]
    sizes = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 32, "vocab_size": 32}
    grid = {"image_size": 16, "downsample": 4, "caption_dim": width, "prefix_len": 12}
    policy = LlamaGen(LlamaGenConfig(**sizes, **grid, model_type="t2i"))
    save_policy(policy, tmp_path / "policy")
    (tmp_path / "drawbench.csv").write_text("Prompts,Category\na seven,Digits\na two,Digits\n")
    data = DataConfig(text_encoder=TextEncoderConfig(path=str(tiny_t5), dtype="float32"))
    results = compared(
        replace(
            config_of(models, tmp_path / "out"),
            compare=[],
            policy=str(tmp_path / "policy"),
            data=data,
            metadata=str(tmp_path / "drawbench.csv"),
            layout="drawbench",
            cache_dir=str(tmp_path / "cache"),
        )
    )
    assert [prompt.text for prompt in results.prompts] == ["a seven", "a two"]
    kept = tmp_path / "out" / "policy" / "images" / "00001" / "metadata.jsonl"
    assert json.loads(kept.read_text())["Category"] == "Digits"
    other = replace(config_of(models, tmp_path / "other"), layout="drawbench", data=data)
    both = replace(other, compare=[str(tmp_path / "policy"), str(models / "base")])
    with pytest.raises(ValueError, match="compare: expected policies that read texts alike"):
        evaluate_texts(both)


def test_the_page_shows_every_picture_beside_its_twin(
    finished: tuple[T2iResults, Path],
) -> None:
    results, folder = finished
    page = write_side_by_side(results, folder, 200).read_text(encoding="utf-8")
    sources = [unquote(source) for source in re.findall(r'<img src="([^"]+)"', page)]
    assert len(sources) == len(set(sources)) == 18
    assert all((folder / source).is_file() for source in sources)
    # prompt by prompt, the base's three and then the tuned policy's
    order = [f"{n}/images/{p:05d}" for p in range(3) for n in ("base", "tuned") for _ in range(3)]
    assert [source.rpartition("/samples/")[0] for source in sources] == order
    assert html.escape(TEXTS[1]) in page
    assert "<b>dog" not in page
    assert page.count("not scored</span>") == 6
    wins = (results.policies[1].scores[:6, 0] > results.policies[0].scores[:6, 0]).sum()
    captions = page.split("<h2>Images</h2>")[1]
    assert captions.count('class="better"') == wins
    few = write_side_by_side(results, folder, 2).read_text(encoding="utf-8")
    assert few.count("<img") == 12
    assert "2 of them here" in few


def test_the_error_of_a_win_rate_is_that_of_the_prompts() -> None:
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    scores, base = torch.tensor([1.0, 1, 1, -1, -1, -1]), torch.zeros(6)
    assert win_rate(scores, base) == 0.5
    # prompts win 1, 1/2 and 0: standard deviation 1/2 over the root of 3
    assert win_rate_error(scores, base, groups) == pytest.approx(0.5 / 3**0.5, rel=1e-6)
    assert math.isnan(win_rate_error(scores[:2], base[:2], groups[:2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"judges": [RewardConfig(name="clipp")]}, "judges.name: expected one of"),
        ({"judges": [RewardConfig(name=LEFT)] * 2}, "judges: .* a name of its own"),
        ({"metadata": "nowhere.jsonl"}, "metadata: expected a file of prompts"),
        (
            {"features": "digits_judge", "features_path": "nowhere"},
            "features_path: judge: expected a folder",
        ),
        (
            {"data": DataConfig(names="digits"), "metadata": None, "layout": "drawbench"},
            "data.text_encoder.path: expected the encoder that the policy was trained with",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    models: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate_texts(replace(config_of(models, tmp_path), **change))


def test_settings_are_refused_by_name(models: Path, tmp_path: Path) -> None:
    config = config_of(models, tmp_path)
    with pytest.raises(ValueError, match=r"metadata: expected evaluation_metadata\.jsonl"):
        replace(config, metadata=None)
    with pytest.raises(ValueError, match="num_images_per_prompt: expected at least 1, got 0"):
        replace(config, num_images_per_prompt=0)
    with pytest.raises(ValueError, match=r"^guidance_scale: expected finite numbers of at least 1"):
        replace(config, guidance_scale=0.5)
    with pytest.raises(ValueError, match="deadline_s: expected a number above 0"):
        replace(config, deadline_s=0.0)
