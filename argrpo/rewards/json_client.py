"""JSON requests to a judge's server, with bounded patience.

A request is sent again where the transport failed, or the server said 408, 429 or 5xx: those may
pass. Anything else is an answer, if a useless one, and a second one would cost as much. Where a
retry would come after the deadline of the step, as by a Retry-After of an hour, it is given up at
once. What the server says is read as JSON and as nothing else: it cannot run code here.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple

try:
    import httpx
except ModuleNotFoundError as error:
    raise ImportError(
        "expected the package httpx for judges behind servers, got none; "
        "pip install 'argrpo[judges]'"
    ) from error

from argrpo.rewards.delivery import Due

_PASSING = (408, 429)
_MAX_BACKOFF_S = 30.0
# A client of httpx looks through all its connections for each of its requests, again and again: 64
# of either take a second of CPU time, and a seventh of one where a client has four.
_CLIENT_CONNECTIONS = 4
_QUOTED = 200  # characters of a useless answer that a message shows


class RequestError(RuntimeError):
    """A request that got no answer, or none that can be used."""

    def __init__(self, problem: str, num_retries: int = 0) -> None:
        super().__init__(problem)
        self.num_retries = num_retries


class Reply(NamedTuple):
    """A server's answer."""

    value: Any  # what the JSON holds
    num_retries: int


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How a judge's server is spoken to."""

    timeout_s: float = 60.0
    """Seconds of one attempt, from the first byte sent to the last one read."""

    max_retries: int = 3
    """Attempts after the first."""

    backoff_s: float = 0.5
    """Before the first retry, doubled before each further one; a random half of it is left off, so
    that requests that failed together do not come back together. Retry-After goes before it."""

    max_connections: int = 64
    """Requests under way at a time."""

    api_key_file: str | None = None
    """A file whose text is sent as a bearer token; the key itself would be saved with the run."""

    @classmethod
    def of(cls, options: Mapping[str, Any] | None, place: str) -> "Connection":
        """From the option `connection` of a judge.

        Raises:
            ValueError: an unknown key or a value out of range, named under `place`.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(options or {}) - set(known))
        if unknown:
            raise ValueError(f"{place}: expected some of {', '.join(known)}, got {unknown[0]}")
        connection = cls(**(options or {}))
        for name, least in (("max_retries", 0), ("max_connections", 1)):
            if getattr(connection, name) < least:
                raise ValueError(
                    f"{place}.{name}: expected at least {least}, got {getattr(connection, name)}"
                )
        if not 0 < connection.timeout_s < math.inf:
            raise ValueError(
                f"{place}.timeout_s: expected a finite number above 0, got {connection.timeout_s}"
            )
        if connection.backoff_s < 0:
            raise ValueError(f"{place}.backoff_s: expected at least 0, got {connection.backoff_s}")
        return connection

    def headers(self, place: str) -> dict[str, str]:
        """What every request says of who sends it."""
        if self.api_key_file is None:
            return {}
        path = Path(self.api_key_file).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"{place}.api_key_file: expected a file with the key, got {path}"
            )
        return {"Authorization": f"Bearer {path.read_text(encoding='utf-8').strip()}"}


class JsonClient:
    """Posts JSON to one address. Used from one event loop at a time."""

    def __init__(self, url: str, connection: Connection, *, place: str) -> None:
        """Connects to nothing yet.

        Args:
            url: where to post, http or https.
            connection: how.
            place: of the judge's options, for messages.

        Raises:
            ValueError: no such kind of address.
            FileNotFoundError: the key is not there.
        """
        _check_url(url, place)
        self.url = url
        self._connection = connection
        self._headers = {"Content-Type": "application/json", **connection.headers(place)}
        # Not the global generators: judges must not move what a run draws from.
        self._random = random.Random()
        self._clients: list[httpx.AsyncClient] = []
        self._free: list[httpx.AsyncClient] = []  # one for each connection that is not in use
        self._room = asyncio.Semaphore(connection.max_connections)

    async def post(self, body: object, due: Due = lambda: math.inf) -> Reply:
        """Send a request until it is answered, or patience ends.

        Args:
            body: what JSON can hold.
            due: what would be sent again after this is given up at once.

        Raises:
            RequestError: there is no answer to use.
        """
        content = json.dumps(body).encode()
        async with self._connected() as client:
            for attempt in range(self._connection.max_retries + 1):
                problem, wait_s = "", None
                try:
                    async with asyncio.timeout(self._connection.timeout_s):
                        response = await client.post(self.url, content=content)
                except TimeoutError:
                    problem = f"no answer within {self._connection.timeout_s:g} s"
                except httpx.TransportError as error:
                    problem = f"{type(error).__name__} {error}".strip()
                except httpx.RequestError as error:  # as a body that is not packed as it says
                    problem = f"{type(error).__name__} {error}".strip()
                    raise RequestError(f"{self.url}: {problem}", attempt) from error
                else:
                    if response.status_code == 200:
                        return Reply(_parsed(response, self.url, attempt), attempt)
                    problem = f"HTTP {response.status_code}: {_quoted(response.content)}"
                    if response.status_code not in _PASSING and response.status_code < 500:
                        raise RequestError(f"{self.url}: {problem}", attempt)
                    wait_s = retry_after(response.headers.get("Retry-After"), time.time())
                if attempt < self._connection.max_retries:
                    wait_s = self._backoff(attempt) if wait_s is None else wait_s
                    left_s = max(due() - time.perf_counter(), 0.0)
                    if wait_s > left_s:
                        problem += f"; {left_s:.1f} s are left, a retry is due in {wait_s:.1f} s"
                        raise RequestError(f"{self.url}: {problem}", attempt)
                    await asyncio.sleep(wait_s)
        raise RequestError(f"{self.url}: {problem}", self._connection.max_retries)

    async def close(self) -> None:
        """Let go of open connections; the next request opens others."""
        clients, self._clients, self._free = self._clients, [], []
        self._room = asyncio.Semaphore(self._connection.max_connections)
        for client in clients:
            await client.aclose()

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client with a connection to spare; the one that was in use last, which is warm."""
        async with self._room:
            if not self._clients:
                self._open()
            free = self._free  # which `close` may replace meanwhile
            client = free.pop()
            try:
                yield client
            finally:
                free.append(client)

    def _open(self) -> None:
        left, certificates = self._connection.max_connections, httpx.create_ssl_context()
        while left > 0:
            count = min(left, _CLIENT_CONNECTIONS)
            client = httpx.AsyncClient(
                headers=self._headers,
                verify=certificates,
                # Attempts have one limit over all, so that a server that drips cannot stretch it.
                timeout=None,
                limits=httpx.Limits(max_connections=count, max_keepalive_connections=count),
                # The environment is read in cli.py alone; proxies and .netrc are of it.
                trust_env=False,
            )
            self._clients.append(client)
            self._free = [client] * count + self._free
            left -= count

    def _backoff(self, attempt: int) -> float:
        longest = min(self._connection.backoff_s * 2.0**attempt, _MAX_BACKOFF_S)
        return longest * self._random.uniform(0.5, 1.0)


def retry_after(header: str | None, now: float) -> float | None:
    """Seconds that a server asks to be left alone, at least 0; None where it says nothing of use.

    Args:
        header: the value of Retry-After, seconds or a date.
        now: seconds since the epoch.
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - now
        except (ValueError, OverflowError):  # the second of a time zone without end
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _check_url(url: str, place: str) -> None:
    try:
        parsed = httpx.URL(url)
        is_server = parsed.scheme in ("http", "https") and bool(parsed.host)
        is_server = is_server and (parsed.port or 0) < 2**16
    except httpx.InvalidURL:
        is_server = False
    if not is_server:
        raise ValueError(f"{place}.url: expected http://HOST... or https://HOST..., got {url!r}")


def _parsed(response: httpx.Response, url: str, num_retries: int) -> Any:
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError) as error:  # the second where it is nested without end
        problem = f"expected JSON, got {_quoted(response.content)} ({error})"
        raise RequestError(f"{url}: {problem}", num_retries) from error


def _quoted(content: bytes) -> str:
    # Not as the server says that it is encoded, which may be as zlib, or as nothing that there is.
    flat = " ".join(content.decode("utf-8", "replace").split())
    return flat if len(flat) <= _QUOTED else f"{flat[:_QUOTED]}..."
