"""The cases of bench_kernels.py: ours is right in all of them, and so is what they call right."""

from collections.abc import Iterator

import pytest
import torch
from kernel_scripts import CPU, ROOT, VOCAB, Scripts, cases_of, kernel_scripts


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripts]:
    with kernel_scripts(monkeypatch) as found:
        yield found


def ops() -> list[str]:
    names = (ROOT / "bench" / "bench_kernels.py").read_text().partition("OPS = (")[2]
    return [word.strip('" ,\n') for word in names.partition(")")[0].split(",") if word.strip()]


@pytest.mark.parametrize("op", ops())
def test_every_op_has_cases_in_which_ours_and_all_of_torch_are_right(
    scripts: Scripts, op: str
) -> None:
    lines: list[str] = []
    found = cases_of(scripts, op)
    assert found
    for case in found:
        entrants = scripts.runs.checked(case, case.make(), scripts.method(say=lines.append))
        names = [entrant.contender.name for entrant in entrants]
        assert names[0] == scripts.cases.OURS
        ours_and_torch = [
            contender.name
            for contender in case.contenders
            if contender.name.startswith(("argrpo", "floor", "torch", "sdpa flash"))
        ]
        assert set(ours_and_torch) <= set(names)
        assert entrants[0].error <= 1
    missing = {line.partition(":")[0] for line in lines}
    assert missing <= {
        f"without {name}"
        for name in ("liger-kernel", "cut-cross-entropy", "flash-attn", "xformers", "flashinfer",
                     "cudnn_attention", "efficient_attention")
    }  # fmt: skip


def test_an_error_is_measured_by_that_of_plain_pytorch(scripts: Scripts) -> None:
    wide = torch.ones(4, dtype=torch.float64)
    expected = scripts.cases.Expected((wide, wide), (wide.float() * (1 + 1e-3), wide.float()))
    twice = (wide.float() * (1 + 2e-3), None)
    assert scripts.cases.numeric_error(twice, expected) == pytest.approx(1, rel=0.01)
    assert scripts.cases.numeric_error((wide.float() * torch.nan,), expected) == float("inf")
    # Where plain PyTorch is exact, 1e-5 is the unit.
    assert scripts.cases.numeric_error((None, wide * (1 + 2e-5)), expected) == pytest.approx(2)


@pytest.mark.parametrize("filters", ["none", "k and p"])
def test_a_draw_is_right_when_its_tokens_and_scores_are(scripts: Scripts, filters: str) -> None:
    case = next(
        case for case in cases_of(scripts, "sample_logits") if case.facts["filters"] == filters
    )
    inputs = case.make()
    right = case.expect(inputs)
    drawn = case.contenders[0].bind(inputs)()
    same, fair = scripts.sampling.same_draw, scripts.sampling.fair_draw
    assert same(drawn, right) == 0
    # One row in 50 may move; all three of three are wrong here.
    assert fair(drawn._replace(logprobs=drawn.logprobs + 0.1), right) == 3
    assert fair(drawn._replace(entropies=drawn.entropies + 0.1), right) == 3
    other = scripts.sampling.Drawn((drawn.token_ids + 1) % VOCAB, None, None)
    assert same(other, right) == 3
    if filters != "none":
        assert fair(other._replace(token_ids=inputs.logits.argmin(dim=1)), right) == 3


def test_conditional_log_probs_and_kept_sets_are_judged_where_they_are_asked_for(
    scripts: Scripts,
) -> None:
    case = next(
        case for case in cases_of(scripts, "guided_sample") if case.facts["filters"] == "k and p"
    )
    inputs = case.make()
    right = case.expect(inputs)
    cond, kept = (
        next(one for one in case.contenders if one.name == f"argrpo, {name} too")
        for name in ("conditional log-prob", "kept set")
    )
    scored = cond.bind(inputs)()
    assert cond.judge(scored, right) == 0
    # The log-prob of the guided distribution is not that of the conditional branch.
    assert cond.judge(scored._replace(cond_logprobs=scored.logprobs), right) == 3
    assert cond.judge(scored._replace(cond_logprobs=scored.cond_logprobs * torch.nan), right) == 3
    packed = kept.bind(inputs)()
    assert kept.judge(packed, right) == 0
    assert kept.judge(packed._replace(support=torch.full_like(packed.support, 255)), right) == 3
    # A token at the edge may be on either side, but the token drawn is inside.
    at = packed.token_ids[:, None]
    bits = packed.support.gather(1, at // 8) & ~(128 >> at % 8)
    without = packed.support.scatter(1, at // 8, bits.to(torch.uint8))
    assert kept.judge(packed._replace(support=without), right) == 3


@pytest.mark.parametrize("has_prefix", [True, False])
def test_attention_is_over_the_prefix_that_the_engine_gives(
    scripts: Scripts, has_prefix: bool
) -> None:
    found = cases_of(scripts, "paged_decode_attention")
    assert [case.facts["prefix"] for case in found] == ["aggregate", "none"]
    case = found[0 if has_prefix else 1]
    inputs = case.make()
    assert (inputs.prefix is not None) is has_prefix
    assert inputs.keys.shape[2] == case.facts["keys"] + has_prefix
    ours = case.contenders[0]
    assert ours.judge(ours.bind(inputs)(), case.expect(inputs)) <= 1
    if has_prefix:
        without = inputs._replace(prefix=None)
        assert ours.judge(ours.bind(without)(), case.expect(inputs)) > 1


def test_every_call_of_a_record_logs_at_the_next_position(scripts: Scripts) -> None:
    for case in cases_of(scripts, "record_draw"):
        inputs = case.make()
        for contender in case.contenders:
            call = contender.bind(inputs)
            first = [None if part is None else part.clone() for part in call()]
            assert contender.judge(first, case.expect(inputs)) == 0
            _x, positions, entries, token_ids, *_ = call()
            assert positions.tolist() == [2] * 3
            assert entries.unique().tolist() == [1]
            assert torch.equal(token_ids[:, 1], inputs.draw.token_ids)
            # One that writes nothing is not right by what another wrote.
            assert contender.judge(call(), case.expect(inputs)) == float("inf")


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.6), (20, 0.7)])
def test_eager_peers_filter_as_we_do(scripts: Scripts, top_k: int, top_p: float) -> None:
    logits = torch.randn(50, VOCAB) * 2
    logits[:, 7] = logits[:, 3]  # a tie
    kept = scripts.sampling.filtered_logits(logits, top_k, top_p) > -torch.inf
    ours = scripts.sampling.filter_mask(logits, top_k, top_p)
    # A running fp32 sum may put the edge of the top-p set one token further: 1 row of 50.
    assert (kept != ours).sum() <= 1


def test_the_least_work_is_that_of_the_docstrings(scripts: Scripts) -> None:
    place = scripts.cases.Place.on(CPU, torch.bfloat16)
    grid = scripts.cases.Grid(("XL",), (64,), (128,), (128,), (16384,))
    work = {case.name: case.work for case in scripts.bench.cases_of(place, grid)}
    name = "paged_decode_attention, model XL, images 128, sequences 256, keys 128, prefix {}"
    attention = work[name.format("none")].num_bytes
    assert attention == pytest.approx(170e6, rel=0.01)
    # The aggregate is a vector of fp32 for each sequence.
    assert work[name.format("aggregate")].num_bytes - attention == 256 * 1280 * 4
    layer = work["rmsnorm_residual, model XL, rows 16384, width 1280, pass forward and backward"]
    assert layer.num_bytes == pytest.approx(2 * 168e6, rel=0.01)
    head = work["token_logprobs, model XL, tokens 16384, pass forward"]
    assert head.flops == 2 * 16384 * 1280 * VOCAB
