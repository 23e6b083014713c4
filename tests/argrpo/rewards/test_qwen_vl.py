"""The local Qwen2.5-VL judge, on a tiny random one built from a config, with its real processor."""

import shutil
from pathlib import Path

import pytest
import torch

from argrpo.data import Prompt
from argrpo.rewards.qwen_vl import QwenVlReward
from argrpo.rewards.sharing import SharedNetworks
from argrpo.rewards.vlm_questions import load_question

_CPU = torch.device("cpu")
_MARKS = ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
_PROMPTS = [Prompt("a cat"), Prompt("a long description of two dogs and a hat"), Prompt("a")]


def _save_processor(folder: Path) -> dict[str, int]:
    """A tokenizer of bytes and the model's processor of images; ids of the marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([f"<|{mark}|>" for mark in _MARKS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    images = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    Qwen2_5_VLProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=_TEMPLATE,
    ).save_pretrained(folder)
    return {mark: tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for mark in _MARKS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("qwen")
    ids = _save_processor(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    config = Qwen2_5_VLConfig(
        text_config={
            **sizes,
            "vocab_size": 256 + len(_MARKS),
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
            },
            "eos_token_id": ids["im_end"],
            "pad_token_id": ids["endoftext"],
        },
        vision_config={
            **sizes,
            "depth": 2,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        **{f"{name}_token_id": ids[name] for name in ("vision_start", "vision_end")},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():  # logits of order 1, so that odds differ between images
        model.lm_head.weight.mul_(10.0)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def shared() -> SharedNetworks:
    return SharedNetworks()


@pytest.fixture
def judge(folder, shared):
    """A judge in fp32; digits are a few of 263 tokens to a random model, so any mass will do."""

    def make(**options: object) -> QwenVlReward:
        options = {"dtype": "float32", "least_mass": 0.0, **options}
        return QwenVlReward(folder, device=_CPU, shared=shared, **options)

    return make


@pytest.mark.parametrize("question", ["rubric", "fake", "weird"])
def test_a_batch_gives_what_one_image_at_a_time_gives(question: str, judge) -> None:
    images = torch.rand(3, 3, 64, 64)
    together = judge(question=question)(images, _PROMPTS)
    alone = judge(question=question, reward_batch=1)(images, _PROMPTS)
    # Rows padded on the left, in fp32; scores are up to 5.
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert together.isfinite().all()
    asked = load_question(question)
    assert together.min() > asked.lowest and together.max() < asked.highest


def test_the_score_is_the_mean_by_the_librarys_own_odds(folder, judge) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    image, question = torch.rand(3, 64, 64), load_question("rubric")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": question.about("a cat")}]
    conversation = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(
        images=[image], text=[f'{conversation}{{"score": '], do_rescale=False, return_tensors="pt"
    )
    with torch.no_grad():
        odds = model(**inputs).logits[0, -1].softmax(0)
    digits = torch.stack([odds[processor.tokenizer.encode(str(d))[0]] for d in range(6)])
    wanted = (digits * torch.arange(6)).sum() / digits.sum()
    (score,) = judge()(image[None], [Prompt("a cat")])
    torch.testing.assert_close(score, wanted, atol=1e-5, rtol=0)


def test_odds_that_lie_elsewhere_are_no_score(judge) -> None:
    scores = judge(least_mass=0.5)(torch.rand(2, 3, 64, 64), _PROMPTS[:2])
    assert scores.isnan().all()


def test_pixels_follow_the_picture_route_within_a_grey_level(judge) -> None:
    from torchvision.transforms.functional import to_pil_image

    model = judge()._model
    # Middle greys: a picture clips what bicubic weights push beyond white and black.
    image = torch.randint(96, 160, (3, 80, 80), dtype=torch.uint8)
    ours = model._inputs(image[None] / 255, ["?"], "")["pixel_values"]
    theirs = model._processor.image_processor(to_pil_image(image), return_tensors="pt")
    # A picture is rounded to 8 bits after each of two passes: half a level, stretched by bicubic
    # weights whose sizes add up to 1.3 or so, and another half, over the deviation of pixels.
    assert (ours - theirs["pixel_values"]).abs().max() < 1.15 / 255 / 0.26


def test_a_random_model_answers_nothing_that_could_be_read(judge) -> None:
    scores = judge(read="answer", max_new_tokens=3)(torch.rand(2, 3, 64, 64), _PROMPTS[:2])
    assert scores.isnan().all()


def test_written_answers_are_read_unless_they_were_cut_off(judge, monkeypatch) -> None:
    described = judge(question="rubric_described", read="answer", max_new_tokens=30)
    tokenizer = described._model._processor.tokenizer
    said = ['{"score": 3.5, "e": ""}<|im_end|>', '{"description": "", "score": 3.', "..."]
    written = [tokenizer.encode(text) for text in said]
    longest = len(written[1])
    # What has ended is filled up; what was cut off has as many tokens as it may.
    written[0] += [tokenizer.pad_token_id] * (longest - len(written[0]))
    written[2] = (written[2] * longest)[:longest]
    rows = torch.tensor(written)

    def generate(input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.cat([input_ids, rows[: len(input_ids)]], dim=1)

    monkeypatch.setattr(described._model._model, "generate", generate)
    scores = described(torch.rand(3, 3, 64, 64), _PROMPTS)
    assert scores[0] == 3.5
    assert scores[1:].isnan().all()


def test_three_questions_share_one_model_and_ask_once_about_an_image(judge) -> None:
    judges = [judge(question=question) for question in ("rubric", "fake", "weird")]
    assert len({id(each._model) for each in judges}) == 1
    assert [each.name for each in judges] == ["qwen_vl_rubric", "qwen_vl_fake", "qwen_vl_weird"]
    calls: list[int] = []
    hook = judges[0]._model._model.register_forward_hook(lambda *_: calls.append(1))
    images = torch.rand(3, 3, 64, 64)
    for each in (*judges, judge(question="rubric", name="again")):
        each(images, _PROMPTS)
    hook.remove()
    assert calls == [1, 1, 1]


def test_offloaded_weights_give_the_same_score(folder, judge) -> None:
    images = torch.rand(1, 3, 64, 64)
    offloaded = QwenVlReward(folder, device=_CPU, dtype="float32", least_mass=0.0, offload=True)
    for _ in range(2):
        scores = offloaded(images.clone(), _PROMPTS[:1]), judge()(images, _PROMPTS[:1])
        # A library's product may sum in another order where weights lie at other addresses.
        torch.testing.assert_close(*scores, atol=1e-5, rtol=0)
        offloaded.rest()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"read": "minds"}, "read: expected probabilities or answer, got 'minds'"),
        (
            {"question": "rubric_described"},
            "read: expected answer for the question rubric_described",
        ),
        ({"dtype": "int4"}, "dtype: expected one of float32, bfloat16, got 'int4'"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
    ],
)
def test_an_option_that_is_none_is_refused(options: dict, message: str, folder) -> None:
    with pytest.raises(ValueError, match=rf"rewards\.qwen_vl\.options\.{message}"):
        QwenVlReward(folder, device=_CPU, **options)


def test_folders_without_a_model_are_refused(folder, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"published in Qwen/Qwen2\.5-VL-3B-Instruct"):
        QwenVlReward(str(tmp_path), device=_CPU)
    for name, message in (
        ("tokenizer.json", "with its processor"),
        ("model.safetensors", "got .*"),
    ):
        part = tmp_path / name.partition(".")[0]
        shutil.copytree(folder, part)
        (part / name).unlink()
        with pytest.raises(ValueError, match=rf"rewards\.qwen_vl\.options\.folder: .*{message}"):
            QwenVlReward(str(part), device=_CPU)


def test_weights_that_are_not_all_there_are_refused(folder, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    part = tmp_path / "part"
    shutil.copytree(folder, part)
    weights = load_file(part / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "norm.weight" not in k}
    save_file(kept, part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"folder: expected all weights of the model, .*norm"):
        QwenVlReward(str(part), device=_CPU)
