"""One event loop in a thread of its own, for all that waits for servers."""

import asyncio
import logging
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

_LOG = logging.getLogger(__name__)

CLOSING_S = 5.0
"""Seconds that work has to end once it is told to."""

Result = TypeVar("Result")


class BackgroundLoop:
    """Runs coroutines while the caller goes on. The thread starts with the first one."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Start some work; what it raises, `result()` of the future raises."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            # A daemon, so that a process that is told to stop does not wait for a server.
            self._thread = threading.Thread(
                target=self._loop.run_forever, name="argrpo judges", daemon=True
            )
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Cancel what is under way and end the thread; `submit` then starts another.

        Work that blocks the thread, or does not let itself be cancelled, is left behind.
        """
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        self._loop = self._thread = None
        ended = asyncio.run_coroutine_threadsafe(_cancel_others(), loop)
        ended.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
        try:
            ended.result(CLOSING_S)
        except TimeoutError:
            _LOG.warning(
                "judges: expected all requests to end within %g s, got one that does not; an async "
                "judge has to await what it waits for, else it holds up all others",
                CLOSING_S,
            )
            return
        thread.join()
        loop.close()


async def _cancel_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
