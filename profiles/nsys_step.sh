#!/usr/bin/env bash
# One training step under Nsight Systems, after warm-up, as a report and two tables.
#
#     profiles/nsys_step.sh --model XL --image_size 384 --images 32 --count 3
#     REPORT=runs/mine profiles/nsys_step.sh train --config my.yaml --profile.steps "[20,22]"
#
# The first form takes options of capture.py step: random weights, a judge that costs nothing. The
# second is a run of yours, traced at the steps that it names.
#
# What to look for, in the tables or in the report's timeline:
#   step           the shares of rollout, decode, reward, logprob and update. The rollout should be
#                  most of it with cheap judges; a judge slower than the rollout comes first.
#   reward NAME    idle time in it is preprocessing on the host, or one image at a time.
#   forward,       products (gemm, cutlass, nvjet) should be most of both, attention the rest. Many
#   backward       small kernels of one kind (elementwise, copy, reduce) are what to fuse.
#   optimizer      a few multi-tensor kernels, bound by memory: AdamW on fp32 masters reads and
#                  writes 28 bytes a weight, the norm 4, bf16 weights 6. Thousands of small kernels
#                  mean that the fused step is off.
#   copies         to the host: each is a wait. One for the norm, a few for metrics and scores.
#   gap ms         before the first kernel of a phase: the clock waits between phases on purpose, so
#                  some tens of us are its price.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
report=${REPORT:-runs/nsys_step}

stop() {
    printf 'nsys_step.sh: %s\n' "$*" >&2
    exit 1
}

command -v nsys > /dev/null ||
    stop "expected nsys on PATH, found none; it comes with the CUDA toolkit and alone from" \
        "developer.nvidia.com/nsight-systems. profiles/capture.py needs no nsys"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    stop "expected a CUDA GPU and a torch that sees it, found none; on a CPU:" \
        "python profiles/capture.py step"

if [ "${1:-}" = train ]; then
    work=(argrpo "$@" --profile.tool nsys)
else
    work=("$python" "$here/capture.py" step --tool nsys --device cuda "$@")
fi
mkdir -p "$(dirname "$report")"
# The capture range opens after the warm-up; node: the kernels inside a graph, one by one.
nsys profile \
    --trace=cuda,nvtx \
    --capture-range=cudaProfilerApi --capture-range-end=stop \
    --cuda-graph-trace=node \
    --sample=none --cpuctxsw=none \
    --force-overwrite=true --output="$report" \
    "${work[@]}"

nsys export --type=sqlite --force-overwrite=true --output="$report.sqlite" "$report.nsys-rep"
"$python" "$here/summarize.py" "$report.sqlite" | tee "$report.md"
