"""How a command tells its end to who started it.

Exit codes:
    0    done
    1    a bug of argrpo, or of a judge of yours: a traceback says where
    2    a setting, a flag or an input file is wrong: one line names it
    69   a judge failed for too long; what there was is saved
    70   a loss or a gradient stopped being a finite number
    74   the machine: disk full, no permission, out of memory
    124  nothing moved for longer than fault.watchdog_s
    130  stopped at once, by Ctrl-C or a second signal
    143  a training was stopped by a signal, and is saved
"""

import re

DONE, BUG, WRONG_INPUT, NO_JUDGE, NOT_FINITE, MACHINE = 0, 1, 2, 69, 70, 74
STOPPED, PREEMPTED = 130, 143  # 124 and a second signal's 130 end the process where they happen


# What PyTorch raises on a CPU is a RuntimeError that says so.
_CPU_MEMORY = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")


def saying(error: Exception) -> str:
    """What an error says, in one line."""
    wanted = _CPU_MEMORY.search(str(error))
    if wanted is None:
        return " ".join(str(error).split())
    return f"memory: expected room for {int(wanted[1]):,} bytes more, got none; ask for less"


def exit_code(error: Exception, is_running: bool) -> int:
    """Whose fault an error is. Once a run is under way its input has been checked, and what looks
    like wrong input is a bug, of argrpo or of a judge."""
    import torch

    from argrpo.image_files import UnreadableImageError
    from argrpo.non_finite import NonFiniteError
    from argrpo.ranks import PeerError
    from argrpo.rewards.failure_watch import JudgesUnavailableError
    from argrpo.run_folder import StorageError

    if isinstance(error, PeerError):
        return BUG  # raised on: main knows what the rank that failed said
    if isinstance(error, NonFiniteError):
        return NOT_FINITE
    if isinstance(error, JudgesUnavailableError):
        return NO_JUDGE
    if isinstance(error, StorageError | torch.OutOfMemoryError | MemoryError):
        return MACHINE
    if isinstance(error, RuntimeError) and _CPU_MEMORY.search(str(error)):
        return MACHINE
    if isinstance(error, UnreadableImageError):
        return WRONG_INPUT
    if isinstance(error, ValueError | FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return BUG if is_running else WRONG_INPUT
    return MACHINE if isinstance(error, OSError) else BUG
