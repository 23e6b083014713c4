"""The rows of a CPU, in under ten minutes of two quiet cores.

    python bench/cpu_suite.py            what `make bench` runs
    python bench/cpu_suite.py --only rollout step --again

gpu_suite.py's way of running parts: each a process of its own under its own time limit, rows
appended as they are measured, and a second call goes on where the first was cut. Peers are looked
for in `.peers/LlamaGen` and `.peers/AR-GRPO`, which git ignores; without them their part of a run
is a printed line.

Exit codes: 0 all that ran went well, 1 a part failed or ran over its limit.
"""

import sys
from collections.abc import Sequence

from gpu_parts import AR_GRPO, LLAMAGEN, Part
from gpu_suite import arguments, listed, run_parts


def _part(name: str, limit_s: float, *options: str, bench: str | None = None) -> Part:
    stem = bench or name
    output = f"{{results}}/{stem}_cpu.jsonl"
    script = (f"bench/bench_{stem}.py", "--device", "cpu", "--output", output)
    return Part(name, (*script, *options), limit_s)


# In order of value. Limits are several times what a part takes on two quiet cores, where all of
# them take about eight and a half minutes, by operations and measured parts: others may be at work.
PARTS = (
    _part("rollout", 300, "--peer", "static_cache", "llamagen", "--peer_path", LLAMAGEN,
          "--samples", "9", "--rollouts", "0", "--deterministic_images", "16", "--resume"),
    _part("loss", 200, "--only", "fixed_scale_gradients", "--tokens", "8192",
          "--samples", "1", "--resume", bench="kernels"),
    _part("step", 300, "--peer", "plain", "argrpo", "--peer_path", AR_GRPO, "--resume"),
    _part("loo_fid", 150, "--resume"),
    _part("decode", 150, "--batches", "2", "--resume"),
    _part("rollout_batches", 200, "--images", "2", "32", "--peer", "llamagen",
          "--peer_path", LLAMAGEN, "--samples", "3", "--rollouts", "0",
          "--deterministic_images", "0", "--resume", bench="rollout"),
    _part("trunk", 150, "--samples", "3", "--resume"),
    _part("rewards", 300, "--judges", "clip_b32", "--samples", "2", "--resume"),
    _part("kernels", 200, "--only", "guided_sample", "sample_logits", "paged_decode_attention",
          "rmsnorm", "rmsnorm_residual", "swiglu", "guided_hidden", "layernorm",
          "layernorm_residual", "bias_gelu", "record_draw", "--resume"),
    _part("slots", 150, "--samples", "1", "--times", "1", "4"),
)  # fmt: skip


def main(argv: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """The suite on this machine; the exit code."""
    args = arguments(argv, parts, __doc__ or "", minutes=10.0)
    if args.list:
        print(listed(parts))
        return 0
    return run_parts(args, parts, "cpu")


if __name__ == "__main__":
    sys.exit(main())
