"""Forward and backward of the training trunk, beside the rate of a large matrix product.

    python bench/bench_trunk.py
    python bench/bench_trunk.py --device cuda --models XL B 3B --images 32 --text_tokens 0 120

The trunk is what lies between embeddings and head: a pass takes token ids and conditions to hidden
states, and their gradient back to the gradient of every weight, without a CUDA graph, as training
does. Contenders take turns, because a machine's speed drifts by more than they differ:

    floor                   the matrix products of the layers alone, forward and both backward
    argrpo                  `policy.hidden` as a run calls it
    argrpo checkpointed     the same, the layers' insides made again backwards
    dense mask              texts only: each image with its own prefix, under a mask [N, 1, S, S]
    flash_attn, xformers    policy.attention, where they are installed

`percent_of_limit` counts the operations that the result needs, products and causal attention once
forward and twice backward, over the rate of a large matrix product that takes turns with them.
One row a contender is appended to --output after each case.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path

import torch
from result_rows import Row, append_row, environment, rows_like
from rollout_contenders import MODELS, Case
from timing import Call, clock_of, pinned_threads
from torch import Tensor
from turns import OtherWork, PeakMemory, measure_in_turns

from argrpo.engine.attention import CausalAttend, prefix_allowed
from argrpo.engine.conditions import Conditions, distinct
from argrpo.environment import cpu_model
from argrpo.models.attention_backends import AttentionName, check_attention
from argrpo.models.llamagen import LlamaGen

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PACKAGES: tuple[AttentionName, ...] = ("flash_attn", "xformers")
# Relative distance of hidden states from ours: other sums, in this dtype.
_SAME_HIDDEN = {torch.float32: 1e-4, torch.bfloat16: 0.05}

Hidden = Callable[[], Tensor]


@dataclass(frozen=True)
class Trunk:
    """A policy, and what its trunk is fed."""

    case: Case
    policy: LlamaGen
    conditions: Conditions
    token_ids: Tensor  # [N, T] int64
    upstream: Tensor  # [N, T, D], the gradient that comes from the head

    @classmethod
    def of(cls, case: Case) -> "Trunk":
        policy = case.policy().requires_grad_(True)
        shape = (case.images, case.num_tokens)
        token_ids = torch.randint(policy.config.vocab_size, shape, device=case.device)
        upstream = torch.randn(*shape, policy.config.dim, device=case.device, dtype=case.dtype)
        return cls(case, policy, case.conditions, token_ids, upstream)

    @property
    def num_rows(self) -> int:
        """Positions that have to be run: image tokens but the last, and each prefix once."""
        fed = self.case.images * (self.case.num_tokens - 1)
        if not self.case.text_tokens:
            return fed + self.case.images
        prompts = distinct(self.conditions).conditions
        return fed + int(self.policy.embed_conditions(prompts).mask.sum())

    @property
    def flops(self) -> int:
        """Products and attention, forward and backward."""
        config, tokens = self.policy.config, self.case.num_tokens
        # A prefix is one entry to an image: so many keys has a row in turn.
        pairs = self.case.images * tokens * (tokens + 1) // 2
        attention = 4 * config.num_layers * config.dim * pairs
        products = 2 * self.num_rows * sum(weight.numel() for weight in self.weights)
        return 3 * (products + attention)

    @property
    def weights(self) -> list[Tensor]:
        """The matrices of all layers, [out, in]."""
        return [p.detach() for p in self.policy.layers.parameters() if p.dim() == 2]

    def ours(self) -> Tensor:
        return self.policy.hidden(self.conditions, self.token_ids)

    def checkpointed(self) -> Tensor:
        self.policy.checkpoints_layers = True
        try:
            return self.ours()
        finally:
            self.policy.checkpoints_layers = False

    def by_package(self, name: AttentionName) -> Tensor:
        self.policy.attention = name
        try:
            return self.ours()
        finally:
            self.policy.attention = "sdpa"

    def dense(self) -> Tensor:
        policy = self.policy
        prefix = policy.embed_conditions(self.conditions)
        x = torch.cat([prefix.embeddings, policy.token_embedding(self.token_ids[:, :-1])], dim=1)
        allowed = prefix_allowed(prefix.mask, x.shape[1])
        hidden = policy.trunk(x, CausalAttend(policy.rotary[: x.shape[1]], allowed))
        return hidden[:, policy.config.prefix_len - 1 :]

    def both_ways(self, hidden: Hidden) -> Call:
        """A pass whose gradients find no older ones."""

        def run() -> None:
            self.policy.zero_grad(set_to_none=True)
            hidden().backward(self.upstream)

        return run

    def products(self) -> Call:
        """What no implementation can leave out, as the library computes it."""
        widths = {width for weight in self.weights for width in weight.shape}
        rows = {w: self.upstream.new_empty(self.num_rows, w).normal_() for w in widths}

        def run() -> None:
            for weight in self.weights:
                out, inside = rows[weight.shape[0]], rows[weight.shape[1]]
                torch.mm(inside, weight.T)
                torch.mm(out, weight)
                torch.mm(out.T, inside)

        return run


def contenders(trunk: Trunk) -> dict[str, Hidden]:
    """What gives hidden states, by name; what cannot is a printed line."""
    found: dict[str, Hidden] = {"argrpo": trunk.ours, "argrpo checkpointed": trunk.checkpointed}
    if trunk.case.text_tokens:
        found["dense mask"] = trunk.dense
    for name in PACKAGES:
        try:
            check_attention(name, trunk.case.device, trunk.case.dtype)
        except ValueError as error:
            print(f"without {name}: {error}")
        else:
            found[name] = partial(trunk.by_package, name)
    return found


@torch.no_grad()
def check_same(hiddens: dict[str, Hidden], dtype: torch.dtype) -> None:
    """Nothing is timed whose result is wrong.

    Raises:
        RuntimeError: a contender gives other hidden states than ours.
    """
    expected = hiddens["argrpo"]()
    for name, hidden in hiddens.items():
        apart = float((hidden() - expected).float().norm() / expected.float().norm())
        if not apart <= _SAME_HIDDEN[dtype]:
            raise RuntimeError(
                f"{name}: expected our hidden states within {_SAME_HIDDEN[dtype]:g}, got a "
                f"relative difference of {apart:.2g}"
            )


def large_product(case: Case) -> tuple[Call, int]:
    """A square matrix product that a device runs at its full rate, and its operations."""
    width = 8192 if case.device.type == "cuda" else 1024
    left, right = torch.randn(2, width, width, device=case.device).to(case.dtype)
    return lambda: torch.mm(left, right), 2 * width**3


def rows_of(trunk: Trunk, samples: int) -> list[Row]:
    """One row a contender."""
    hiddens = contenders(trunk)
    check_same(hiddens, trunk.case.dtype)
    calls = {name: trunk.both_ways(hidden) for name, hidden in hiddens.items()}
    peaks = {name: _peak_bytes(trunk, call) for name, call in calls.items()}
    trunk.policy.zero_grad(set_to_none=True)
    multiply, flops = large_product(trunk.case)
    calls = {"large product": multiply, "floor": trunk.products()} | calls
    timings = measure_in_turns(calls, clock_of(trunk.case.device), warmup=1, samples=samples)
    limit = flops / timings.pop("large product").p50_us * 1e6
    rows = []
    for name, timing in timings.items():
        row: Row = {
            "contender": name,
            "p20_ms": round(timing.p20_us / 1e3, 3),
            "p50_ms": round(timing.p50_us / 1e3, 3),
            "p80_ms": round(timing.p80_us / 1e3, 3),
            "samples": timing.samples,
            "images_per_s": round(trunk.case.images / timing.p50_us * 1e6, 4),
            "over_floor": round(timing.p50_us / timings["floor"].p50_us, 3),
            "over_ours": round(timing.p50_us / timings["argrpo"].p50_us, 3),
            "limit_tflops": round(limit / 1e12, 3),
        }
        if name in peaks:
            rate = trunk.flops / timing.p50_us * 1e6
            row["percent_of_limit"] = round(100 * rate / limit, 1)
            row["peak_mb"] = round(peaks[name] / 1e6, 1)
        rows.append(row)
    return rows


def facts_of(case: Case, threads: int) -> Row:
    """What all rows of a case have in common."""
    texts = f", {case.text_tokens} text positions" if case.text_tokens else ""
    facts: Row = {
        "bench": "trunk",
        "case": f"trunk {case.model} {case.image_size} px, {case.images} images{texts}",
        "work": "embeddings to hidden states and back, gradients of all weights",
        "model": case.model,
        "image_size": case.image_size,
        "images": case.images,
        "text_tokens": case.text_tokens,
        "dtype": str(case.dtype).removeprefix("torch."),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **environment(case.device),
    }
    if case.device.type == "cpu":
        facts |= {"device": cpu_model(), "threads": threads}
    return facts


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'contender':20} {'ms':>10} {'x floor':>8} {'% limit':>8} {'peak MB':>9}"]
    lines += [
        f"{row['contender']:20} {row['p50_ms']:>10.1f} {row['over_floor']:>8.2f} "
        f"{row.get('percent_of_limit', ''):>8} {row.get('peak_mb', ''):>9}"
        for row in rows
    ]
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=list(MODELS), default=["B"], help="published sizes")
    add("--image_size", type=int, default=256, help="pixels a side, a multiple of 16")
    add("--images", type=int, nargs="+", help="of a micro-batch; 32 on a GPU, 2 on a CPU")
    add("--text_tokens", type=int, nargs="+", default=[0], help="of a prefix; 0: class labels")
    add("--dtype", choices=list(DTYPES), help="bfloat16 on a GPU, float32 on a CPU")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="on a CPU")
    add("--samples", type=int, help="timed passes; 20 on a GPU, 5 on a CPU")
    add("--output", type=Path, help="rows are appended here")
    add("--resume", action="store_true", help="leave out cases with rows of this commit in output")
    args = parser.parse_args(argv)
    gpu = args.device.type == "cuda"
    args.dtype = DTYPES[args.dtype or ("bfloat16" if gpu else "float32")]
    args.images = args.images or [32 if gpu else 2]
    args.samples = args.samples or (20 if gpu else 5)
    args.output = args.output or RESULTS / f"trunk_{'gpu' if gpu else 'cpu'}.jsonl"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    sizes = {"image_size": args.image_size, "guidance_scale": 1.0}
    make_case = partial(Case, **sizes, dtype=args.dtype, device=args.device)
    with pinned_threads(args.threads) if args.device.type == "cpu" else nullcontext():
        for model, text_tokens, images in product(args.models, args.text_tokens, args.images):
            case = make_case(model=model, text_tokens=text_tokens, images=images)
            facts = facts_of(case, args.threads)
            if args.resume and is_measured(args.output, facts):
                continue
            others, rows = OtherWork(), rows_of(Trunk.of(case), args.samples)
            facts["others_busy_cores"] = round(others.busy_cores(), 2)
            print(", ".join(f"{name} {value}" for name, value in facts.items()))
            print(table(rows), flush=True)
            for row in rows:
                append_row(args.output, {**facts, **row})


def is_measured(path: Path, facts: Row) -> bool:
    """Whether a case has rows of this commit, machine and dtype already."""
    rows = rows_like(path, facts)
    return any(all(row[key] == facts[key] for key in ("case", "dtype")) for row in rows)


def _peak_bytes(trunk: Trunk, call: Call) -> int:
    """Memory of a pass beside the weights, their gradients included."""
    trunk.policy.zero_grad(set_to_none=True)
    memory = PeakMemory(trunk.case.device)
    call()
    return memory.taken()


if __name__ == "__main__":
    main()
