"""bench/bench_kernels.py: what it measures, whom it refuses, what its rows say.

Over 300 lines because every family of cases needs the same small policy and codebook.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
MODULES = (
    "bench_kernels", "cases_attention", "cases_gradients", "cases_layers", "cases_logprobs",
    "cases_record_draw", "cases_sampling", "head_inputs", "kernel_cases", "kernel_peers",
    "kernel_runs", "result_rows", "timing", "turns",
)  # fmt: skip
VOCAB = 96
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Scripts:
    bench: ModuleType
    cases: ModuleType
    runs: ModuleType
    timing: ModuleType
    sampling: ModuleType
    attention: ModuleType

    def place(self) -> Any:
        return self.cases.Place.on(CPU, torch.float32)

    def method(self, seconds: Iterator[float] | None = None, **changed: Any) -> Any:
        ceilings = self.timing.Ceilings(bytes_per_second=1e9, flops_per_second=1e9)
        clock = FakeClock(seconds) if seconds else self.timing.WallClock()
        method = self.runs.Method(CPU, clock, ceilings, samples=2, caches=("hot",))
        return replace(method, **changed)


class FakeClock:
    """Runs the work and says that it took what the list says."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self._seconds = seconds

    def seconds(self, work: Callable[[], object]) -> float:
        work()
        return next(self._seconds)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripts]:
    """The script and the files beside it, with a small policy and codebook."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    found = {name: importlib.import_module(name) for name in MODULES}
    for name in ("kernel_cases", "cases_record_draw", "cases_sampling", "head_inputs"):
        monkeypatch.setattr(found[name], "VOCAB_SIZE", VOCAB)
    settings = {"none": (0, 1.0), "k and p": (20, 0.95), "k": (20, 1.0), "p": (0, 0.95)}
    monkeypatch.setattr(found["cases_sampling"], "SETTINGS", settings)
    sizes = found["kernel_cases"].Sizes(32, 2, 48)
    monkeypatch.setitem(found["kernel_cases"].MODELS, "tiny", sizes)
    yield Scripts(
        *(found[name] for name in ("bench_kernels", "kernel_cases", "kernel_runs", "timing")),
        *(found[name] for name in ("cases_sampling", "cases_attention")),
    )
    for name in MODULES:
        sys.modules.pop(name, None)


def cases_of(scripts: Scripts, op: str) -> list[Any]:
    grid = scripts.cases.Grid(("tiny",), (3,), (2,), (70,), (2048,))
    return [case for case in scripts.bench.cases_of(scripts.place(), grid) if case.op == op]


def doubling_case(scripts: Scripts, **ways: Callable[[Tensor], tuple[Tensor, ...]]) -> Any:
    """An op that doubles [64] values; `ours` is right unless given, peers are as given."""
    record = scripts.sampling.NamedTuple("Record", [("values", Tensor)])
    right = ways.pop("ours", lambda x: (2 * x,))
    cases = scripts.cases
    contenders = [
        cases.Contender(
            name,
            cases.bound(lambda record, way=way: way(record.values)),
            cases.numeric_error,
            allowed=1.0 if name == cases.OURS else cases.PEER_ROOM,
        )
        for name, way in {cases.OURS: right, **ways}.items()
    ]
    return cases.Case(
        "double",
        {"rows": 64},
        scripts.timing.Work(512, 64),
        lambda: record(torch.randn(64)),
        cases.expect_from(lambda record: (2 * record.values,)),
        contenders,
    )


def command(output: Path, *more: str) -> list[str]:
    return ["--device", "cpu", "--threads", "1", "--cache", "hot", "--samples", "1",
            "--only", "rmsnorm", "--output", str(output), *more]  # fmt: skip


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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


def test_a_wrong_result_of_ours_is_not_timed(scripts: Scripts) -> None:
    case = doubling_case(scripts, ours=lambda x: (2.001 * x,))
    with pytest.raises(scripts.runs.WrongResultError, match="argrpo: expected an error of at most"):
        scripts.runs.measure_case(case, scripts.method(iter(())))


def test_peers_that_are_missing_wrong_or_broken_are_lines_and_the_rest_is_timed(
    scripts: Scripts,
) -> None:
    def missing(_x: Tensor) -> tuple[Tensor, ...]:
        raise scripts.cases.PeerMissingError("fast-double: not installed")

    def broken(_x: Tensor) -> tuple[Tensor, ...]:
        raise TypeError("double() takes 2 arguments")

    case = doubling_case(
        scripts, torch=lambda x: (x + x,), gone=missing, bad=broken, off=lambda x: (2.1 * x,)
    )
    lines: list[str] = []
    say = scripts.runs.said_once(lines.append)
    method = scripts.method(say=say)
    for _ in range(2):
        rows = scripts.runs.measure_case(case, method)
        assert [row["contender"] for row in rows] == ["argrpo", "torch"]
    assert lines[0] == "without fast-double: not installed"
    assert lines[1] == "without bad: TypeError: double() takes 2 arguments"
    assert lines[2].startswith("without off: WrongResultError: off: expected an error of at most 8")
    assert len(lines) == 3


def test_our_own_error_is_not_hidden(scripts: Scripts) -> None:
    def broken(_x: Tensor) -> tuple[Tensor, ...]:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        scripts.runs.measure_case(doubling_case(scripts, ours=broken), scripts.method())


def test_rows_compare_a_call_with_ours_the_floor_and_the_limit(scripts: Scripts) -> None:
    case = doubling_case(scripts, floor=lambda x: (x + x,))
    # One call takes 2.5 ms, so a hot pass is 2 of them; then turns: ours, floor, 1 warm, 2 timed.
    seconds = iter([2.5e-3, 9.0, 9.0, 4e-6, 2e-6, 4e-6, 2e-6])
    ours, floor = scripts.runs.measure_case(case, scripts.method(seconds))
    assert (ours["p50_us"], floor["p50_us"]) == (2.0, 1.0)
    assert (ours["over_ours"], ours["over_floor"]) == (1.0, 2.0)
    assert (floor["over_ours"], floor["over_floor"]) == (0.5, 1.0)
    # 512 bytes at 1e9 a second take 0.512 us.
    assert ours["limit_us"] == 0.512
    assert ours["percent_of_limit"] == 25.6
    assert (ours["cache"], ours["rows"], ours["graph"]) == ("hot", 64, False)
    assert next(seconds, None) is None


def test_inputs_that_never_leave_the_cache_are_not_called_cold(scripts: Scripts) -> None:
    case = doubling_case(scripts)
    assert scripts.runs.input_sets(case, case.make(), "cold", scripts.method()) == ([], 0)
    large = replace(case, work=scripts.timing.Work(32 << 20, 0))
    sets, repeats = scripts.runs.input_sets(large, case.make(), "cold", scripts.method())
    assert (len(sets), repeats) == (5, 1)  # 128 MiB and one more, for a cache of 64
    assert len({id(one) for one in sets}) == 5


@pytest.mark.parametrize("waits", [False, True])
def test_on_a_gpu_calls_are_captured_unless_they_wait_for_the_host(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    events: list[str] = []

    class Graph:
        def replay(self) -> None:
            events.append("replay")

    def captured(calls: list[Callable[[], object]]) -> Graph:
        events.append(f"capture of {len(calls)}")
        return Graph()

    monkeypatch.setattr(scripts.runs, "synchronises", lambda call: waits)
    monkeypatch.setattr(scripts.runs, "captured", captured)
    calls = [lambda name=name: events.append(name) for name in "ab"]
    one = scripts.runs.one_pass(calls, torch.device("cuda"))
    one.run()
    assert one.calls == 2
    assert one.is_graph is not waits
    # The first call compiles, before anything is asked or captured.
    assert events == (["a", "a", "b"] if waits else ["a", "capture of 2", "replay"])


def test_a_peer_that_cannot_be_captured_leaves_the_others_in_the_race(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = doubling_case(scripts, torch=lambda x: (x + x,), odd=lambda x: (x * 2,))
    lines: list[str] = []
    method = scripts.method(say=lines.append)
    entrants = scripts.runs.checked(case, case.make(), method)
    plain = scripts.runs.one_pass
    made: list[int] = []

    def failing_third(calls: list[Callable[[], object]], device: torch.device) -> Any:
        made.append(1)
        if len(made) == 3:
            raise RuntimeError("operation not permitted when stream is capturing")
        return plain(calls, device)

    monkeypatch.setattr(scripts.runs, "one_pass", failing_third)
    passes = scripts.runs.passes_of(entrants, [case.make()], 1, method)
    assert list(passes) == ["argrpo", "torch"]
    assert lines[0].startswith("without odd: RuntimeError: operation not permitted")


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


def test_rows_are_appended_and_a_second_run_leaves_them_out(
    scripts: Scripts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "results" / "kernels.jsonl"
    ceilings = scripts.timing.Ceilings(1e9, 1e9)
    monkeypatch.setattr(scripts.bench, "ceilings_of", lambda device, dtype: ceilings)
    arguments = command(output, "--models", "tiny", "--images", "2", "--tokens", "256")
    scripts.bench.main(arguments)
    rows = rows_in(output)
    assert [row["contender"] for row in rows] == ["argrpo", "torch eager", "torch library"] * 2
    for field in ("bench", "op", "case", "dtype", "work", "p20_us", "p50_us", "p80_us", "peak_mb",
                  "percent_of_limit", "device", "torch", "triton", "commit", "date"):  # fmt: skip
        assert field in rows[0]
    scripts.bench.main([*arguments, "--resume"])
    assert rows_in(output) == rows
    older = [json.dumps({**row, "commit": "older"}) for row in rows[:3]]
    output.write_text("\n".join([*older, *map(json.dumps, rows[3:]), ""]), encoding="utf-8")
    scripts.bench.main([*arguments, "--resume"])
    assert [row["case"] for row in rows_in(output)[6:]] == [rows[0]["case"]] * 3
    assert "% of the limit" in capsys.readouterr().out


def test_a_wrong_case_ends_in_an_error_after_the_others(
    scripts: Scripts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "kernels.jsonl"
    wrong = replace(doubling_case(scripts, ours=lambda x: (3 * x,)), op="rmsnorm")
    right = replace(doubling_case(scripts), op="rmsnorm", facts={"rows": 1})
    monkeypatch.setattr(scripts.bench, "cases_of", lambda place, grid: iter([wrong, right]))
    ceilings = scripts.timing.Ceilings(1e9, 1e9)
    monkeypatch.setattr(scripts.bench, "ceilings_of", lambda device, dtype: ceilings)
    with pytest.raises(SystemExit, match="1 cases with a wrong result were not timed"):
        scripts.bench.main(command(output))
    assert [row["case"] for row in rows_in(output)] == ["rmsnorm, rows 1"]
    assert "WRONG rmsnorm, rows 64: argrpo: expected an error" in capsys.readouterr().out


def test_a_contender_can_be_left_out_but_not_ours(
    scripts: Scripts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "kernels.jsonl"
    ceilings = scripts.timing.Ceilings(1e9, 1e9)
    monkeypatch.setattr(scripts.bench, "ceilings_of", lambda device, dtype: ceilings)
    small = ["--models", "tiny", "--images", "2", "--tokens", "256"]
    scripts.bench.main(command(output, *small, "--without", "torch library", "liger-kernel"))
    assert {row["contender"] for row in rows_in(output)} == {"argrpo", "torch eager"}
    assert "liger-kernel" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        scripts.bench.arguments(["--without", "argrpo"])


def test_odd_numbers_of_tokens_are_refused(
    scripts: Scripts, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        scripts.bench.arguments(["--tokens", "2048", "300"])
    assert "--tokens: expected multiples of 256, got 300" in capsys.readouterr().err


def test_pytest_collects_the_bench_and_groups_it_by_operation(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    chosen = "layernorm and argrpo and rows and not residual and not backward"
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "pytest", "bench/", "--benchmark-only"),
            *("-p", "no:cacheprovider", "-k", chosen, f"--benchmark-json={report}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (bench,) = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    assert bench["group"] == "layernorm"
    assert bench["extra_info"]["model"] == "taming"
    assert bench["extra_info"]["percent_of_limit"] > 0
