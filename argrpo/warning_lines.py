"""Warnings of a command, on standard error."""

import logging
import sys


class WarningLines(logging.Handler):
    """One plain line a warning; standard error is looked up late, because a progress bar stands in
    for it while it runs."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, unless the library whose warning it is writes it itself."""
        if not _is_written_elsewhere(record.name):
            line = f"argrpo: {record.levelname.lower()}: {record.getMessage()}"
            sys.stderr.write(f"{line}\n")


def _is_written_elsewhere(name: str) -> bool:
    """Whether a logger, or one above it below the root, has a handler of its own."""
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None and logger.parent is not None:
        if any(type(handler) is not logging.NullHandler for handler in logger.handlers):
            return True
        logger = logger.parent
    return False
