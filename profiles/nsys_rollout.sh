#!/usr/bin/env bash
# One rollout of the engine under Nsight Systems, after warm-up, as a report and two tables.
#
#     profiles/nsys_rollout.sh --model XL --images 128               options of capture.py rollout
#     REPORT=runs/b PYTHON=python3.12 profiles/nsys_rollout.sh --model B
#
# What to look for, in the tables or in the report's timeline:
#   decode[i..j]   kernels should stand shoulder to shoulder. Idle time by the number of kernels is
#                  the price of a launch: a microsecond or so inside a graph, several outside one.
#   gap ms         a kernel with a large gap before it is one that the host was late for, or the
#                  first of a replay. One gap a replay is right, one a kernel is a lost graph.
#   capture        belongs to the warm-up. Here, it means that a draw needed a graph of its own.
#   copies         to the host inside decode[...]: somebody waits for the device. Expected: none.
#   growth         time of the attention kernel in decode[1..63] against the last range: it should
#                  grow with the positions, every other kernel should not.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
report=${REPORT:-runs/nsys_rollout}

stop() {
    printf 'nsys_rollout.sh: %s\n' "$*" >&2
    exit 1
}

command -v nsys > /dev/null ||
    stop "expected nsys on PATH, found none; it comes with the CUDA toolkit and alone from" \
        "developer.nvidia.com/nsight-systems. profiles/capture.py needs no nsys"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    stop "expected a CUDA GPU and a torch that sees it, found none; on a CPU:" \
        "python profiles/capture.py rollout"

mkdir -p "$(dirname "$report")"
# The capture range opens after the warm-up; node: the kernels inside a graph, one by one.
nsys profile \
    --trace=cuda,nvtx \
    --capture-range=cudaProfilerApi --capture-range-end=stop \
    --cuda-graph-trace=node \
    --sample=none --cpuctxsw=none \
    --force-overwrite=true --output="$report" \
    "$python" "$here/capture.py" rollout --tool nsys --device cuda "$@"

nsys export --type=sqlite --force-overwrite=true --output="$report.sqlite" "$report.nsys-rep"
"$python" "$here/summarize.py" "$report.sqlite" | tee "$report.md"
