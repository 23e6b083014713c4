"""The base policy: it learns tokens with and without labels, the same every time."""

from dataclasses import replace

import pytest
import torch

from argrpo.digits.base_policy import BasePolicyConfig, next_token_loss, train_base_policy
from argrpo.digits.dataset import load_split
from argrpo.digits.tokenizer import DigitTokenizerConfig
from argrpo.digits.training import FitConfig, seeded_init
from argrpo.models.llamagen import LlamaGen
from argrpo.models.vq import VQTokenizer

# A tenth of the recipe's steps at half its batch, one view of the split.
SHORT = replace(
    BasePolicyConfig(), fit=FitConfig(steps=30, batch_size=16, lr=2e-3, seed=4), num_views=1
)


@pytest.fixture(scope="module")
def tokenizer() -> VQTokenizer:
    # Random weights do: what matters is that its token ids follow from the picture.
    with seeded_init(0):
        return VQTokenizer(DigitTokenizerConfig().model).requires_grad_(False)


@pytest.fixture(scope="module")
def trained(tokenizer: VQTokenizer) -> LlamaGen:
    return train_base_policy(SHORT, tokenizer)


def test_the_policy_fits_the_tokenizer_and_the_classes() -> None:
    config = BasePolicyConfig().model
    assert config.num_image_tokens == 64
    assert config.num_classes == 10
    assert config.vocab_size == DigitTokenizerConfig().model.codebook_size
    assert config.head_dim == 64
    size = sum(p.numel() for p in LlamaGen(config).parameters())
    assert 0.8e6 < size < 0.9e6


def test_a_tenth_of_the_recipe_learns_the_tokens(tokenizer: VQTokenizer, trained: LlamaGen) -> None:
    digits = load_split("evaluation")
    token_ids = tokenizer.encode(digits.images[:100])
    with seeded_init(0):
        fresh = LlamaGen(SHORT.model)
    with torch.no_grad():
        before = next_token_loss(fresh, digits.labels[:100], token_ids)
        after = next_token_loss(trained, digits.labels[:100], token_ids)
        null = next_token_loss(trained, torch.full((100,), 10), token_ids)
    assert before == pytest.approx(5.55, abs=0.1)  # ln 256: nothing known
    assert after < before - 1.0
    assert null < before - 1.0, "the null class learns from the labels that were dropped"


def test_the_loss_is_the_mean_log_prob_of_the_tokens(trained: LlamaGen) -> None:
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, 256, (3, 64), generator=generator)
    labels = torch.tensor([0, 4, 9])
    logprobs = trained.logits(labels, token_ids).log_softmax(dim=-1)
    chosen = logprobs.gather(2, token_ids[..., None]).mean()
    # fp32 sums of 192 terms of size 5.
    torch.testing.assert_close(next_token_loss(trained, labels, token_ids), -chosen)


def test_training_twice_gives_the_same_bits(tokenizer: VQTokenizer, trained: LlamaGen) -> None:
    again = train_base_policy(SHORT, tokenizer)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, trained.state_dict()[name]), name


def test_label_dropout_decides_what_the_null_class_learns(tokenizer: VQTokenizer) -> None:
    one_step = replace(SHORT.fit, steps=1)
    never, always = (
        train_base_policy(replace(SHORT, fit=one_step, label_dropout=share), tokenizer)
        for share in (0.0, 1.0)
    )
    with seeded_init(SHORT.fit.seed):
        start = LlamaGen(SHORT.model).cls_embedding.embedding_table.weight

    def moved(policy: LlamaGen) -> list[bool]:
        # Weight decay moves every row by 1e-4 of itself; a gradient moves one by the whole lr.
        change = policy.cls_embedding.embedding_table.weight - start
        return (change.abs().amax(dim=1) > 0.5 * SHORT.fit.lr).tolist()

    assert moved(always) == [False] * 10 + [True]
    assert moved(never)[10] is False
    assert sum(moved(never)) > 5


def test_a_tokenizer_that_does_not_fit_is_refused_by_name(tokenizer: VQTokenizer) -> None:
    other = replace(SHORT, model=replace(SHORT.model, vocab_size=512))
    with pytest.raises(ValueError, match=r"tokenizer: expected 512 codes, .*got 256"):
        train_base_policy(other, tokenizer)
    coarse = replace(SHORT, model=replace(SHORT.model, downsample=8))
    with pytest.raises(ValueError, match=r"tokenizer: expected 8 pixels a token .*got 4"):
        train_base_policy(coarse, tokenizer)
