"""The hub without its library's patience.

huggingface_hub asks a hub that does not answer six times for each file, which takes the better part
of a minute, and looks into its cache only then. Here one request says whether the hub is there.
Where it is not, what is cached is read at once, and what is not is missed at once.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session

_MISSED = (LocalEntryNotFoundError, OfflineModeIsEnabled)
_PATIENCE_S = 4.0  # for one request; a name server that does not answer is in it, too


@contextmanager
def hub_within_reach() -> Iterator[None]:
    """Loads by names of the hub stand inside: they read its cache alone where it does not answer.

    Raises:
        HubOutOfReachError: it did not, and something is not cached.
    """
    if _answers():
        yield
        return
    kept, logged = constants.HF_HUB_OFFLINE, logging.root.manager.disable
    # What its environment variable sets at import, and what its library asks before each request.
    constants.HF_HUB_OFFLINE = True
    # Libraries log each failure that they then raise.
    logging.disable(logging.ERROR)
    try:
        yield
    except Exception as error:  # of any library, each in its own words
        if not any(isinstance(cause, _MISSED) for cause in _causes(error)):
            raise
        raise HubOutOfReachError(constants.ENDPOINT) from error
    finally:
        constants.HF_HUB_OFFLINE = kept
        logging.disable(logged)


class HubOutOfReachError(Exception):
    """Something is not cached, and the hub at this address does not answer."""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised for or amid."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _answers() -> bool:
    answers: list[object] = []

    def ask() -> None:
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=_PATIENCE_S))
        except Exception:  # of the client that the hub's library has in this version
            return

    # A thread, because looking an address up has no time limit of its own.
    asking = threading.Thread(target=ask, name="argrpo hub", daemon=True)
    asking.start()
    asking.join(_PATIENCE_S)
    return bool(answers)
