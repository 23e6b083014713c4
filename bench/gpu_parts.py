"""The parts of gpu_suite.py, in order of value: a new one is one record in `PARTS`.

Proof that kernels and engine are right comes first, since nothing else counts without it; then the
figures that decide, at XL: rollouts, sampling, attention, the loss head, a whole step. Other sizes
and more peers follow. Limits are twice what a part should take, most of it the compilation of
kernels and peers; all together they should take four or five calls of nine minutes.

Tests spend their time in the compiler, one kernel after the other: those of sampling 93 s for 154.
Where pytest-xdist is found they share it among processes; nothing else asks for that package.
"""

from dataclasses import dataclass
from importlib.util import find_spec

# Git-ignored; without a checkout there its peers are a printed line.
LLAMAGEN, AR_GRPO = ".peers/LlamaGen", ".peers/AR-GRPO"
_WORKERS = ("-n", "8") if find_spec("xdist") else ()


@dataclass(frozen=True)
class Part:
    """One thing to run."""

    name: str
    command: tuple[str, ...]  # arguments of python; {results} becomes the results folder
    limit_s: float
    needs: tuple[str, ...] = ()  # packages that a bare machine lacks; without them it is left out


def _tests(
    name: str,
    limit_s: float,
    *words: str,
    marked: str = "gpu or not gpu",
    workers: tuple[str, ...] = (),
) -> Part:
    # -P: the root on sys.path would answer to the name `kernels`.
    pytest = ("-P", "-m", "pytest", "-p", "no:cacheprovider", "-m", marked)
    # A line a test, so that the log of one that hangs says which.
    told = ("-v", "--tb=short", "--durations=10")
    return Part(f"tests_{name}", (*pytest, *told, *workers, *words), limit_s)


def _kernel_tests(name: str, limit_s: float, *words: str) -> Part:
    return _tests(name, limit_s, *words, workers=_WORKERS)


def _kernels(name: str, limit_s: float, *ops: str, models: tuple[str, ...] = ()) -> Part:
    output = "{results}/kernels_gpu.jsonl"
    script = ("bench/bench_kernels.py", "--device", "cuda", "--resume", "--output", output)
    of_models = ("--models", *models) if models else ()
    return Part(f"kernels_{name}", (*script, *of_models, "--only", *ops), limit_s)


def _rollout(name: str, limit_s: float, *options: str) -> Part:
    output = "{results}/rollout_gpu.jsonl"
    script = ("bench/bench_rollout.py", "--device", "cuda", "--resume", "--output", output)
    return Part(f"rollout_{name}", (*script, *options), limit_s)


def _peers(name: str, limit_s: float, *peers: str) -> Part:
    """XL at its largest beside peers; each compiles all its layers, so few of them a part."""
    return _rollout(
        name, limit_s, "--models", "XL", "--images", "128", "--samples", "7",
        "--peer", *peers, "--peer_path", LLAMAGEN,
    )  # fmt: skip


def _bench(name: str, limit_s: float, *options: str, needs: tuple[str, ...] = ()) -> Part:
    """A script that writes rows of its own name."""
    output = f"{{results}}/{name}_gpu.jsonl"
    script = (f"bench/bench_{name}.py", "--device", "cuda", "--resume", "--output", output)
    return Part(name, (*script, *options), limit_s, needs)


def _sweep(op: str) -> Part:
    command = ("bench/sweep.py", "--op", op, "--output", "{results}/sweep.jsonl")
    return Part(f"sweep_{op}", command, 90)


def _file(op: str) -> str:
    return f"tests/kernels/test_{op}.py"


_SAMPLING = tuple(
    map(_file, ("counter_random", "sample_rows", "guided_sampling",
                "sampling_statistics", "sampling_refusals", "record_draw"))
)  # fmt: skip
_ATTENTION = (_file("paged_attention"),)
_LOSS = tuple(
    map(_file, ("row_softmax", "token_logprobs", "logprob_gradients", "grouped_logprob_kl", "kl"))
)
# Budgets are compiled for every target anywhere, and the filters' specification is plain PyTorch
# and tested with hypothesis, which a bare machine lacks.
_NO_GPU_NEEDED = (_file("budgets"), _file("token_filter"))
_OTHERS = (*_SAMPLING, *_ATTENTION, *_LOSS, *_NO_GPU_NEEDED)

PARTS = (
    _kernel_tests("sampling", 200, *_SAMPLING),
    _kernel_tests("attention", 90, *_ATTENTION),
    _kernel_tests("loss", 150, *_LOSS),
    _kernel_tests("layers", 150, "tests/kernels", *(f"--ignore={path}" for path in _OTHERS)),
    _tests("engine", 90, "tests/engine", marked="gpu"),
    _rollout("xl", 150, "--models", "XL", "--images", "128", "64", "8",
             "--guidance_scale", "2", "1"),
    _kernels("sampling", 120, "guided_sample", "sample_logits", models=("XL",)),
    _kernels("attention", 150, "paged_decode_attention", models=("XL",)),
    _kernels("loss", 100, "token_logprobs", "fixed_scale_gradients", models=("XL",)),
    _bench("step", 200, "--models", "XL", "--image_size", "384", "--images", "32",
           "--judges", "clip", "hpsv2", "--samples", "3", "--warmup", "1",
           "--peer", "plain", "argrpo", "--peer_path", AR_GRPO),
    _peers("static_cache", 200, "static_cache"),
    _rollout("text", 240, "--models", "XL", "--images", "128", "--text_tokens", "120",
             "--peer", "static_cache"),
    _peers("llamagen", 150, "llamagen", "llamagen_graph"),
    _bench("decode", 150, "--image_size", "256", "384"),
    _tests("training", 60, "tests/argrpo/test_training_attention.py", marked="gpu"),
    _bench("trunk", 120, "--models", "XL", "B", "--text_tokens", "0", "120"),
    _rollout("b_3b", 150, "--models", "B", "3B", "--images", "128", "8",
             "--guidance_scale", "2", "1"),
    _rollout("xl_384", 120, "--models", "XL", "--images", "64", "--image_size", "384"),
    Part("slots", ("bench/bench_slots.py", "--device", "cuda",
                   "--output", "{results}/slots_gpu.jsonl"), 150),
    _bench("loo_fid", 60),
    _bench("rewards", 240, needs=("open_clip", "torchvision", "pyiqa", "httpx")),
    _tests("peers", 100, "tests/bench/test_timing.py", "tests/bench/test_static_cache_peers.py",
           marked="gpu"),
    _kernels("sampling_sizes", 120, "guided_sample", models=("B", "3B")),
    _kernels("attention_sizes", 240, "paged_decode_attention", models=("B", "3B")),
    _kernels("loss_sizes", 100, "token_logprobs", "fixed_scale_gradients", models=("B", "3B")),
    _kernels("groups", 80, "logprob_gradients", "grouped_logprob_kl"),
    _kernels("layers", 80, "rmsnorm", "rmsnorm_residual", "swiglu", "guided_hidden",
             "layernorm", "layernorm_residual", "bias_gelu", "record_draw"),
    _peers("hf_static", 240, "hf_static"),
    _peers("llamagen_compiled", 300, "llamagen_compiled"),
    _peers("static_cache_4", 400, "static_cache_4"),
    _rollout("b_peers", 240, "--models", "B", "--images", "128", "8", "--peer", "static_cache",
             "hf_static", "llamagen", "llamagen_graph", "--peer_path", LLAMAGEN),
    _rollout("l_xxl", 200, "--models", "L", "XXL", "--images", "128", "8",
             "--guidance_scale", "2", "1"),
    _rollout("sizes_384", 240, "--models", "B", "L", "XXL", "3B", "--images", "64",
             "--image_size", "384"),
    _sweep("paged_attention"),
    _sweep("sample_head"),
    _sweep("sample_rows"),
    _sweep("sample_rows_long"),
    _sweep("fused_rows"),
    _sweep("head_chunks"),
    _sweep("row_softmax"),
    _sweep("rmsnorm"),
    _sweep("swiglu"),
)  # fmt: skip
