"""bench/turns.py: memory that contenders share."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"

FAULTS = """
import resource, torch, turns

def faults_of(times):  # pages asked for while 64 MiB are made and let go of so often
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = faults_of(4)
with turns.kept_heap():
    faults_of(16)  # takes it, in a few pieces that alignment leaves too small at first
    inside = faults_of(4)
print(outside, inside, faults_of(1))
"""


def test_freed_memory_is_taken_again_without_the_system_and_given_back_at_the_end() -> None:
    # A process of its own: the heap of one that ran other tests has room that nobody asks for.
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, cwd=BENCH
    )
    outside, inside, after = map(int, done.stdout.split())
    # Other threads of the process may ask for a few; huge pages are 32 to such a tensor.
    assert inside < outside / 4
    assert after > outside / 8  # one tensor of four, less what is mapped around a fault
