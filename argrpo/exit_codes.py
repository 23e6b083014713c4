"""How a command tells its end to who started it; what each code means stands in argrpo/cli.py."""

DONE, BUG, WRONG_INPUT, NO_JUDGE, NOT_FINITE, MACHINE = 0, 1, 2, 69, 70, 74
STOPPED, PREEMPTED = 130, 143  # 124 and a second signal's 130 end the process where they happen


def exit_code(error: Exception, is_running: bool) -> int:
    """Whose fault an error is. Once a run is under way its input has been checked, and what looks
    like wrong input is a bug, of argrpo or of a judge."""
    import torch

    from argrpo.image_folder import UnreadableImageError
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
    if isinstance(error, UnreadableImageError):
        return WRONG_INPUT
    if isinstance(error, ValueError | FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return BUG if is_running else WRONG_INPUT
    return MACHINE if isinstance(error, OSError) else BUG
