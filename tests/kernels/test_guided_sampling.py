"""kernels/guided_sampling.py: hidden states to tokens, by each of its ways, against fp64.

Errors are those of the logits. With fp32 sums of exact half-precision products they are a few 1e-6.
Where hidden states are mixed and rounded first, and where a CPU's library product is rounded to
half precision, the bound is what the reference loses in the same precision, at most twice.
"""

from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from argrpo.kernels import guided_sampling as module
from argrpo.kernels import sample_rows
from argrpo.kernels.counter_random import gumbel_noise
from argrpo.kernels.draw import Draw, DrawKeys, DrawSettings
from argrpo.kernels.guidance import head_logits, mix_branches, mix_hidden
from argrpo.kernels.guided_sampling import guided_sample, guided_sample_reference, sample_logits
from argrpo.kernels.sample_head import sample_head
from argrpo.kernels.sample_rows import RowTile
from argrpo.kernels.token_filter import filter_mask, unpack_support

NATIVE = torch.cuda.is_available()
DEVICE = torch.device("cuda" if NATIVE else "cpu")
HALVES = (torch.float16, torch.bfloat16)
# fp32 sums of 100 products and of 1,000 exponentials, against fp64
EXACT = 2e-5


class Case(NamedTuple):
    """One call of `guided_sample`."""

    cond: Tensor  # [B, D]
    uncond: Tensor | None  # [B, D]
    head_weight: Tensor  # [V, D]
    keys: DrawKeys
    settings: DrawSettings

    def rows(self, rows: slice) -> "Case":
        """Some of its rows."""
        keys = self.keys
        keys = DrawKeys(keys.seed, keys.image_ids[rows], keys.positions[rows])
        uncond = None if self.uncond is None else self.uncond[rows]
        return self._replace(cond=self.cond[rows], uncond=uncond, keys=keys)

    def wide(self) -> "Case":
        """The same in fp64."""
        uncond = None if self.uncond is None else self.uncond.double()
        return self._replace(
            cond=self.cond.double(), uncond=uncond, head_weight=self.head_weight.double()
        )


@pytest.fixture(autouse=True)
def one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time goes by operations: rows in one part (test_sample_rows.py)."""
    if NATIVE:
        return

    def whole(vocab_size: int) -> RowTile:
        return RowTile(max(16, triton.next_power_of_2(vocab_size)), 1, 16)

    monkeypatch.setattr(sample_rows, "row_tile", whole)


def _case(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    guided: bool = True,
    scalars: tuple[float, float, float, float] = (2.5, 0.9, 0, 1),
) -> Case:
    num_rows, width, vocab_size = shape
    cond = torch.randn(num_rows, width)
    uncond = cond + 0.3 * torch.randn(num_rows, width)
    head = torch.randn(vocab_size, width) / width**0.5
    cond, uncond, head = (part.to(DEVICE, dtype) for part in (cond, uncond, head))
    ids = torch.arange(num_rows, device=DEVICE)
    keys = DrawKeys(torch.tensor([99], device=DEVICE), ids, 5 * ids)
    settings = DrawSettings(torch.tensor(scalars, device=DEVICE), scalars[2:] != (0, 1))
    return Case(cond, uncond if guided else None, head, keys, settings)


def _assert_close_to_fp64(case: Case, *, cond_logprobs: bool, limit: float) -> Draw:
    """Scores of the tokens drawn, and that those tokens are all but the best, against fp64."""
    filtered = case.settings.filtered
    draw = guided_sample(*case, cond_logprobs=cond_logprobs, support=filtered)
    wide = case.wide()
    want = guided_sample_reference(*wide, cond_logprobs=True, support=filtered)
    assert (draw.token_ids == want.token_ids).float().mean() >= (1 if limit == EXACT else 0.6)
    noisy = _noisy(wide)
    # Two errors of a logit: that of the token drawn and that of the best.
    behind = noisy.amax(dim=1) - noisy.gather(1, draw.token_ids[:, None])[:, 0]
    assert behind.max() <= 2 * limit
    same = draw.token_ids == want.token_ids
    pairs = {
        "logprobs": (draw.logprobs[same], want.logprobs[same]),
        "entropies": (draw.entropies, want.entropies),
    }
    if cond_logprobs:
        assert draw.cond_logprobs is not None and want.cond_logprobs is not None
        pairs["cond_logprobs"] = (draw.cond_logprobs[same], want.cond_logprobs[same])
    else:
        assert draw.cond_logprobs is None
    for name, (got, expected) in pairs.items():
        assert got.dtype == torch.float32
        assert (got.double() - expected).abs().max() <= limit, name
    return draw


def _noisy(wide: Case) -> Tensor:
    """[B, V] logits over temperature, with their noise; -inf where the filters drop them."""
    scale, temperature, top_k, top_p = wide.settings.scalars.double()
    hidden = wide.cond
    if wide.uncond is not None:
        hidden = wide.uncond + scale * (wide.cond - wide.uncond)
    logits = hidden @ wide.head_weight.t()
    noisy = logits / temperature + gumbel_noise(wide.keys, logits.shape[1])
    if not wide.settings.filtered:
        return noisy
    return noisy.masked_fill(~filter_mask(logits, top_k, top_p, temperature), -torch.inf)


def _lost_by_rounding(case: Case) -> float:
    """What logits lose when hidden states are mixed, rounded and multiplied in half precision."""
    scale, temperature = case.settings.scalars[:2]
    mixed = case.cond if case.uncond is None else mix_hidden(case.cond, case.uncond, scale)
    rounded = (mixed @ case.head_weight.t()).double()
    wide = case.wide()
    exact = wide.cond
    if wide.uncond is not None:
        exact = wide.uncond + scale.double() * (wide.cond - wide.uncond)
    return ((rounded - exact @ wide.head_weight.t()).abs().max() / temperature).item()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 999), (3, 100, 1024), (5, 128, 300), (2, 7, 5)], ids=str)
@pytest.mark.parametrize(
    ("guided", "cond_logprobs"), [(False, False), (False, True), (True, True)], ids=str
)
def test_fused_draw_keeps_fp32_sums(
    shape: tuple[int, int, int], dtype: torch.dtype, guided: bool, cond_logprobs: bool
) -> None:
    case = _case(shape, dtype, guided=guided)
    _assert_close_to_fp64(case, cond_logprobs=cond_logprobs, limit=EXACT)


@pytest.mark.parametrize("shape", [(3, 8, 4097), (1, 8, 16384), (1, 8, 65536)], ids=str)
def test_fused_draw_reaches_over_large_vocabularies(shape: tuple[int, int, int]) -> None:
    case = _case(shape, torch.float16)
    _assert_close_to_fp64(case, cond_logprobs=True, limit=EXACT)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_guidance_mixed_as_it_is_loaded_loses_one_rounding(dtype: torch.dtype) -> None:
    case = _case((5, 128, 1000), dtype)
    # Twice, because Triton's interpreter truncates to bf16 where a GPU rounds.
    limit = 2 * _lost_by_rounding(case)
    _assert_close_to_fp64(case, cond_logprobs=False, limit=limit)


@pytest.mark.parametrize("cond_logprobs", [False, True])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("scalars", [(2.5, 0.9, 0, 1), (1.5, 1.1, 200, 0.9)], ids=["all", "kept"])
def test_product_and_row_kernel_agree_with_fp64(
    scalars: tuple[float, float, float, float], guided: bool, cond_logprobs: bool
) -> None:
    case = _case((3, 100, 999), torch.float32, guided=guided, scalars=scalars)
    draw = _assert_close_to_fp64(case, cond_logprobs=cond_logprobs, limit=EXACT)
    if case.settings.filtered:
        want = guided_sample_reference(*case.wide(), support=True)
        assert draw.support is not None and want.support is not None
        assert torch.equal(unpack_support(draw.support, 999), unpack_support(want.support, 999))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("top_k", [0, 200])
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_no_scale_mixes_the_padding_of_a_row_into_the_draw(scale: float, top_k: int) -> None:
    case = _case((3, 100, 999), torch.float32, scalars=(scale, 0.9, top_k, 1))
    _assert_close_to_fp64(case, cond_logprobs=True, limit=EXACT)


def test_more_rows_than_a_tile_take_the_library_product(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case((3, 64, 300), torch.float16)
    fused: list[int] = []

    def counted(cond: Tensor, *args: Any, **options: Any) -> Draw:
        fused.append(len(cond))
        return sample_head(cond, *args, **options)

    monkeypatch.setattr(module, "sample_head", counted)
    guided_sample(*case)
    assert fused == [3]
    monkeypatch.setattr(module, "_MAX_FUSED_ROWS", 2)
    _assert_close_to_fp64(case, cond_logprobs=False, limit=2 * _lost_by_rounding(case))
    _assert_close_to_fp64(case, cond_logprobs=True, limit=2 * _lost_by_rounding(case))
    assert fused == [3]


def test_fused_draw_reaches_over_several_row_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_FUSED_ROWS", 1000)
    case = _case((70, 32, 140), torch.float16)
    _assert_close_to_fp64(case, cond_logprobs=True, limit=EXACT)


@pytest.mark.parametrize("cond_logprobs", [False, True])
def test_a_row_of_the_fused_draw_does_not_depend_on_its_batch(cond_logprobs: bool) -> None:
    case = _case((5, 96, 500), torch.float16)
    batch, again = (guided_sample(*case, cond_logprobs=cond_logprobs) for _ in range(2))
    for row in range(5):
        alone = guided_sample(*case.rows(slice(row, row + 1)), cond_logprobs=cond_logprobs)
        for name, value in alone._asdict().items():
            whole = getattr(batch, name)
            assert (value is None) == (whole is None)
            if value is not None:
                assert torch.equal(value, whole[row : row + 1]), (name, row)
                assert torch.equal(whole, getattr(again, name)), name


def test_fused_draws_are_those_of_the_row_kernel_on_the_same_logits() -> None:
    case = _case((64, 64, 400), torch.float16, guided=False)
    fused = guided_sample(*case)
    logits = case.cond.float() @ case.head_weight.float().t()
    want = module.sample_logits_reference(logits, case.keys, case.settings)
    assert torch.equal(fused.token_ids, want.token_ids)
    few = case.rows(slice(0, 4))
    rows = sample_logits(logits[:4], few.keys, few.settings)
    assert torch.equal(rows.token_ids, fused.token_ids[:4])


def test_greedy_is_certain_also_for_the_conditional_branch() -> None:
    case = _case((3, 64, 300), torch.float16, scalars=(2.0, 0.0, 0, 1))
    assert case.uncond is not None
    for run in (guided_sample, guided_sample_reference):
        draw = run(*case, cond_logprobs=True)
        logits = head_logits(case.cond.float(), case.head_weight.float())
        uncond = head_logits(case.uncond.float(), case.head_weight.float())
        assert torch.equal(draw.token_ids, (uncond + 2.0 * (logits - uncond)).argmax(dim=1))
        assert draw.cond_logprobs is not None
        for scores in (draw.logprobs, draw.entropies, draw.cond_logprobs):
            assert scores.tolist() == [0.0] * 3


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:All-NaN")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_hidden_state_says_nan_and_leaves_other_rows_alone(temperature: float) -> None:
    case = _case((3, 64, 200), torch.float16, scalars=(2.0, temperature, 0, 1))
    whole = guided_sample(*case)
    case.cond[1] = float("nan")
    broken = guided_sample(*case)
    assert 0 <= broken.token_ids[1] < 200
    assert broken.logprobs.isnan().tolist() == [False, True, False]
    assert broken.entropies.isnan().tolist() == [False, True, False]
    assert broken.logprobs[::2].tolist() == whole.logprobs[::2].tolist()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_a_gpu_makes_logits_of_every_float(dtype: torch.dtype) -> None:
    """Tensors without numbers, which ask a GPU's rules and no GPU."""
    with FakeTensorMode():
        hidden, weight = (torch.zeros(rows, 8, dtype=dtype, device="cuda") for rows in (3, 5))
        logits = head_logits(hidden, weight)
    assert logits.dtype == torch.promote_types(dtype, torch.float32)
    assert logits.shape == (3, 5) and logits.is_cuda


@pytest.mark.parametrize("shape", [(1, 7), (3, 100), (2, 1280)], ids=str)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_branches_mix_as_the_reference_mixes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    cond, uncond = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    mixed = mix_branches(cond, uncond, torch.tensor([2.5], device=DEVICE))
    # one unit in the last place: a fused multiply-add on a GPU, truncation in the interpreter
    ulp = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}[dtype]
    torch.testing.assert_close(mixed, mix_hidden(cond, uncond, 2.5), rtol=ulp, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [768, 1280, 3200])
@pytest.mark.parametrize("num_rows", [1, 8, 64, 128])
@pytest.mark.parametrize("scalars", [(2.0, 1.0, 0, 1), (4.0, 1.0, 2000, 0.95)], ids=["all", "kept"])
def test_real_shapes_lose_no_more_than_half_precision_does(
    width: int, num_rows: int, scalars: tuple[float, float, float, float]
) -> None:
    case = _case((num_rows, width, 16384), torch.bfloat16, scalars=scalars)
    limit = 2 * _lost_by_rounding(case)
    for cond_logprobs in (False, True):
        draw = guided_sample(*case, cond_logprobs=cond_logprobs)
        want = guided_sample_reference(*case.wide(), cond_logprobs=True)
        same = draw.token_ids == want.token_ids
        assert same.float().mean() > 0.8
        assert (draw.logprobs - want.logprobs)[same].abs().max() < limit
        assert (draw.entropies - want.entropies).abs().max() < limit


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [8, 128])
def test_a_captured_draw_replays_from_what_the_device_holds(num_rows: int) -> None:
    case = _case((num_rows, 1280, 16384), torch.bfloat16)
    guided_sample(*case)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = guided_sample(*case)
    for _ in range(3):
        case.keys.positions.add_(1)
        case.cond.mul_(1.1)
        graph.replay()
        eager = guided_sample(*case)
        assert torch.equal(captured.token_ids, eager.token_ids)
        assert torch.equal(captured.logprobs, eager.logprobs)
