"""Milliseconds an image from token ids to pixels, by batch and precision.

    python bench/bench_decode.py
    python bench/bench_decode.py --device cuda --image_size 256 384 --batches 1 8 32 128

The tokenizer is the published VQ-16 with random weights; a call decodes a batch of images at once,
with launches, as training does it. Contenders take turns:

    argrpo           `VQTokenizer.decode`, in fp32 and in bf16
    channels_last,   the same module with its weights and codes in the memory format that argrpo
    contiguous       does not take on this device
    torch.compile    the decoder compiled (a GPU only: it takes minutes on a CPU)

All must give the pixels of fp32 before anything is timed. `percent_of_limit` counts the operations
of convolutions and products over the rate of a large matrix product in this dtype.
"""

import argparse
import copy
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import product
from math import isqrt
from pathlib import Path

import torch
from result_rows import Row, append_row, environment, rows_like
from rollout_peers import or_a_line
from step_case import TOKENIZERS
from timing import Call, Ceilings, ceilings_of, clock_named, pinned_threads
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from turns import OtherWork, PeakMemory, measure_in_turns

from argrpo.environment import cpu_features, cpu_model
from argrpo.models.vq import VQTokenizer

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS = "argrpo"
_LAYOUTS = {torch.channels_last: "channels_last", torch.contiguous_format: "contiguous"}
# Of pixels in [0, 1], relative to their size: other orders of sums; bf16 keeps 8 bits.
_SAME_PIXELS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}

Decode = Callable[[], Tensor]


@dataclass(frozen=True)
class DecodeCase:
    """So many images of one size."""

    image_size: int
    batch: int
    device: torch.device
    tokenizer: str = "VQ-16"

    @property
    def name(self) -> str:
        return f"decode {self.image_size} px, {self.batch} images"

    @property
    def num_tokens(self) -> int:
        return (self.image_size // TOKENIZERS[self.tokenizer].downsample) ** 2

    def token_ids(self) -> Tensor:
        """[N, T] int64."""
        size = self.batch, self.num_tokens
        return torch.randint(TOKENIZERS[self.tokenizer].codebook_size, size, device=self.device)

    def make_tokenizer(self) -> VQTokenizer:
        torch.manual_seed(1)
        with self.device:
            return VQTokenizer(TOKENIZERS[self.tokenizer]).eval().requires_grad_(False)

    def flops(self) -> int:
        """Of convolutions and products, counted on tensors without data."""
        with torch.device("meta"):
            tokenizer = VQTokenizer(TOKENIZERS[self.tokenizer])
            side = isqrt(self.num_tokens)
            latents = torch.empty(self.batch, tokenizer.config.codebook_dim, side, side)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            tokenizer.decode_latents(latents)
        return int(counter.get_total_flops())


def decode_in(layout: torch.memory_format, tokenizer: VQTokenizer, token_ids: Tensor) -> Tensor:
    """What `VQTokenizer.decode` gives of square grids, at once, by networks in a given layout."""
    side = isqrt(token_ids.shape[1])
    codes = tokenizer.codes(token_ids.reshape(-1, side, side)).contiguous(memory_format=layout)
    with torch.no_grad():
        pixels = tokenizer.decoder(tokenizer.post_quant_conv(codes))
    return pixels.float().mul_(0.5).add_(0.5).clamp_(0.0, 1.0)


def contenders(
    case: DecodeCase, dtypes: Sequence[str], *, compiled: bool
) -> dict[tuple[str, str], Decode]:
    """Calls that decode the same tokens, by name and dtype; fp32 of ours comes first."""
    plain, token_ids = case.make_tokenizer(), case.token_ids()

    def decoder(tokenizer: VQTokenizer) -> Decode:
        return lambda: tokenizer.decode(token_ids, decode_batch=case.batch)

    found = {}
    for name in dict.fromkeys(["float32", *dtypes]):
        tokenizer = copy.deepcopy(plain).to(dtype=DTYPES[name])
        found[OURS, name] = decoder(tokenizer)
        other = next(layout for layout in _LAYOUTS if layout != tokenizer.memory_format)
        strided = copy.deepcopy(tokenizer).to(memory_format=other)
        found[_LAYOUTS[other], name] = partial(decode_in, other, strided, token_ids)
        if compiled:
            whole = copy.deepcopy(tokenizer)
            whole.decoder.compile(dynamic=False)
            found["torch.compile", name] = decoder(whole)
    return found


def check_same(decoders: dict[tuple[str, str], Decode]) -> dict[tuple[str, str], Decode]:
    """Those that give the pixels of fp32; one that cannot run is a printed line.

    Raises:
        RuntimeError: one gives other pixels.
    """
    expected = decoders[OURS, "float32"]()
    kept = {}
    for (name, dtype), decode in decoders.items():
        pixels = or_a_line(f"{name} {dtype}", decode)
        if pixels is None:
            continue
        apart = float((pixels - expected).norm() / expected.norm())
        if not apart <= _SAME_PIXELS[DTYPES[dtype]]:
            raise RuntimeError(
                f"{name} {dtype}: expected the pixels of fp32 within "
                f"{_SAME_PIXELS[DTYPES[dtype]]:g}, got a relative difference of {apart:.2g}"
            )
        kept[name, dtype] = decode
    return kept


def rows_of(case: DecodeCase, args: argparse.Namespace, ceilings: dict[str, Ceilings]) -> list[Row]:
    """One row a contender and dtype."""
    decoders = check_same(contenders(case, args.dtypes, compiled=args.compiled))
    calls: dict[str, Call] = {" ".join(key): decode for key, decode in decoders.items()}
    peaks = {name: _peak_bytes(case.device, call) for name, call in calls.items()}
    clock = clock_named(args.clock, case.device, args.threads)
    timings = measure_in_turns(calls, clock, warmup=1, samples=args.samples)
    flops, baseline = case.flops(), timings[f"{OURS} float32"].p50_us
    rows = []
    for name, dtype in decoders:
        timing = timings[f"{name} {dtype}"]
        rate = ceilings[dtype].flops_per_second
        rows.append(
            {
                "contender": name,
                "dtype": dtype,
                "p20_ms": round(timing.p20_us / 1e3, 3),
                "p50_ms": round(timing.p50_us / 1e3, 3),
                "p80_ms": round(timing.p80_us / 1e3, 3),
                "samples": timing.samples,
                "ms_per_image": round(timing.p50_us / 1e3 / case.batch, 3),
                "images_per_s": round(case.batch / timing.p50_us * 1e6, 3),
                "over_float32": round(timing.p50_us / baseline, 3),
                "over_ours": round(timing.p50_us / timings[f"{OURS} {dtype}"].p50_us, 3),
                "limit_tflops": round(rate / 1e12, 3),
                "percent_of_limit": round(100 * flops / rate / timing.p50_us * 1e6, 1),
                "peak_mb": round(peaks[f"{name} {dtype}"] / 1e6, 1),
            }
        )
    return rows


def _peak_bytes(device: torch.device, call: Call) -> int:
    memory = PeakMemory(device)
    call()
    return memory.taken()


def facts_of(case: DecodeCase, threads: int, clock: str) -> Row:
    """What all rows of a case have in common."""
    facts: Row = {
        "bench": "decode",
        "case": case.name,
        "work": "token ids to pixels in [0, 1], fp32",
        "tokenizer": case.tokenizer,
        "image_size": case.image_size,
        "images": case.batch,
        "gflop_an_image": round(case.flops() / case.batch / 1e9, 1),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **environment(case.device),
    }
    if case.device.type == "cpu":
        facts["clock"] = clock
        facts |= {"device": cpu_model(), "cpu_features": " ".join(cpu_features())}
        facts["threads"] = threads
    return facts


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'':24}{'ms/image':>10}{'x fp32':>8}{'x ours':>8}{'% limit':>9}{'peak MB':>9}"]
    lines += [
        f"{row['contender'] + ' ' + row['dtype']:24}{row['ms_per_image']:>10.1f}"
        f"{row['over_float32']:>8.2f}{row['over_ours']:>8.2f}{row['percent_of_limit']:>9.1f}"
        f"{row['peak_mb']:>9.0f}"
        for row in rows
    ]
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--image_size", type=int, nargs="+", default=[256], help="pixels a side, 16 a token")
    add("--batches", type=int, nargs="+", help="images at once; 1 8 32 128 on a GPU, 1 2 on a CPU")
    add("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    add("--tokenizer", choices=list(TOKENIZERS), default="VQ-16")
    add("--compiled", action="store_true", default=None, help="torch.compile too; on a GPU")
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))), help="on a CPU")
    add("--clock", choices=["wall", "process"], default="wall", help="process: one thread's CPU")
    add("--samples", type=int, help="timed calls: 20 on a GPU, 2 on a CPU")
    add("--output", type=Path, help="rows are appended here")
    add("--resume", action="store_true", help="leave out cases with rows of this commit in output")
    args = parser.parse_args(argv)
    gpu = args.device.type == "cuda"
    args.batches = args.batches or ([1, 8, 32, 128] if gpu else [1, 2])
    args.samples = args.samples or (20 if gpu else 2)
    args.compiled = gpu if args.compiled is None else args.compiled
    args.output = args.output or RESULTS / f"decode_{'gpu' if gpu else 'cpu'}.jsonl"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    with pinned_threads(args.threads) if args.device.type == "cpu" else nullcontext():
        clock = clock_named(args.clock, args.device, args.threads)
        ceilings = {
            name: ceilings_of(args.device, DTYPES[name], clock)
            for name in {*args.dtypes, "float32"}
        }
        make = partial(DecodeCase, device=args.device, tokenizer=args.tokenizer)
        for image_size, batch in product(args.image_size, args.batches):
            case = make(image_size, batch)
            facts = facts_of(case, args.threads, args.clock)
            known = rows_like(args.output, facts)
            if args.resume and any(row["case"] == case.name for row in known):
                continue
            others, rows = OtherWork(), rows_of(case, args, ceilings)
            facts["others_busy_cores"] = round(others.busy_cores(), 2)
            print(", ".join(f"{name} {value}" for name, value in facts.items()))
            print(table(rows), flush=True)
            for row in rows:
                append_row(args.output, {**facts, **row})


if __name__ == "__main__":
    main()
