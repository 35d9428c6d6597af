"""A proxy before an S3 server that goes wrong as stores do: by a script, by chance of a seed, or for ever.

Requests go on byte for byte with the host that the client has signed, so that the server finds the signatures right.
"""

import asyncio
import random
import socket
import struct
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto

import aiohttp
from aiohttp import web
from yarl import URL


class Fault(Enum):
    """What happens to a request."""

    SLOW_DOWN = auto()
    """503: too many requests."""
    INTERNAL = auto()
    """500: the server does not know why."""
    EXPIRED = auto()
    """403: the credentials were valid once."""
    DENIED = auto()
    """403: the credentials do not suffice."""
    MISSING = auto()
    """404: there is no such bucket."""
    TRUNCATED = auto()
    """The answer announces all its bytes, and the connection is closed after half of them."""
    HANG = auto()
    """The connection is taken and nothing comes, not even the permission to send the body."""
    RESET = auto()
    """The connection is reset before an answer."""
    LOST = auto()
    """The server does what is asked; its answer is not told."""
    SHORT = auto()
    """The answer is half of what it should be and says that this is all."""
    FORGOTTEN = auto()
    """The answer is that all is well, and nothing is done."""


@dataclass(frozen=True)
class Asked:
    """What is known of a request: its method, path with query, and headers in one string."""

    method: str
    path: str
    headers: str


Choice = Callable[[Asked], Fault | None]

ANSWERS = {
    Fault.SLOW_DOWN: (503, "SlowDown", "Please reduce your request rate."),
    Fault.INTERNAL: (500, "InternalError", "We encountered an internal error. Please try again."),
    Fault.EXPIRED: (403, "ExpiredToken", "The provided token has expired."),
    Fault.DENIED: (403, "AccessDenied", "Access Denied"),
    Fault.MISSING: (404, "NoSuchBucket", "The specified bucket does not exist"),
}

# Of one connection, not of the message (RFC 9110, section 7.6.1); lengths follow from the bytes.
_HOP = frozenset(("connection", "keep-alive", "transfer-encoding", "expect", "te", "trailer", "upgrade"))
_CHANGING = frozenset(("PUT", "POST", "DELETE"))


def fits(fault: Fault, method: str) -> bool:
    """Whether a fault can happen to a request of this method."""
    match fault:
        case Fault.TRUNCATED | Fault.SHORT:
            return method == "GET"
        case Fault.FORGOTTEN:
            return method == "PUT"
        case Fault.LOST:
            return method in _CHANGING
    return True


class Faults:
    """Decides what happens to each request, and counts what has; may be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._choice: Choice = lambda asked: None
        self.injected: Counter[Fault] = Counter()
        self.asked: list[Asked] = []

    def calm(self) -> None:
        """Let every request through from now on, and forget the counts."""
        self.choose(lambda asked: None)

    def choose(self, choice: Choice) -> None:
        """Ask `choice` about every request from now on, one at a time; the counts begin at nothing."""
        with self._lock:
            self._choice, self.injected, self.asked = choice, Counter(), []

    def script(self, *faults: Fault) -> None:
        """Let these happen in their order, each to the next request that it fits; then nothing any more."""
        left = deque(faults)
        self.choose(lambda asked: left.popleft() if left and fits(left[0], asked.method) else None)

    def always(self, fault: Fault) -> None:
        """Let this happen to every request that it fits."""
        self.choose(lambda asked: fault if fits(fault, asked.method) else None)

    def chance(self, share: float, seed: int, faults: Sequence[Fault]) -> None:
        """Let one of those that fit happen to this share of requests."""
        draw = random.Random(seed)

        def choice(asked: Asked) -> Fault | None:
            fault = draw.choice([fault for fault in faults if fits(fault, asked.method)] or [None])
            return fault if draw.random() < share else None

        self.choose(choice)

    def next(self, asked: Asked) -> Fault | None:
        """What happens to this request."""
        with self._lock:
            fault = self._choice(asked)
            self.asked.append(asked)
            if fault:
                self.injected[fault] += 1
            return fault


@contextmanager
def proxy(server: str) -> Iterator[tuple[str, Faults]]:
    """The address of a proxy, in a thread of its own, before the server at this address; and its faults."""
    faults, ready, ports = Faults(), threading.Event(), list[int]()
    loop, done = asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            runner = web.ServerRunner(web.Server(_Handler(server, faults, session, done)), shutdown_timeout=0)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            ports.append(runner.addresses[0][1])
            ready.set()
            await done.wait()
            await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield f"http://127.0.0.1:{ports[0]}", faults
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(10)


class _Handler:
    def __init__(self, server: str, faults: Faults, session: aiohttp.ClientSession, done: asyncio.Event) -> None:
        self.server, self.faults, self.session, self.done = server, faults, session, done

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        headers = "\n".join(f"{name}: {value}" for name, value in request.headers.items())
        match fault := self.faults.next(Asked(request.method, request.raw_path, headers)):
            case Fault.HANG:
                await self.done.wait()
            case Fault.RESET:
                return _cut(request, reset=True)
            case Fault.FORGOTTEN:
                await _body(request)
                return web.Response(headers={"ETag": '"0"'})
            case Fault() if fault in ANSWERS:
                return await self._refused(request, fault)
        status, answered, body = await self._forwarded(request)
        if fault is Fault.LOST:
            return _cut(request)
        if fault is Fault.SHORT:
            return web.Response(status=status, body=body[: len(body) // 2])
        answer = web.StreamResponse(status=status, headers=answered)
        await answer.prepare(request)
        if request.method != "HEAD":
            await answer.write(body[: len(body) // 2] if fault is Fault.TRUNCATED else body)
        if fault is Fault.TRUNCATED:
            return _cut(request, answer)
        await answer.write_eof()
        return answer

    async def _refused(self, request: web.BaseRequest, fault: Fault) -> web.StreamResponse:
        await _body(request)
        status, code, message = ANSWERS[fault]
        text = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
        return web.Response(status=status, text=text, content_type="application/xml")

    async def _forwarded(self, request: web.BaseRequest) -> tuple[int, list[tuple[str, str]], bytes]:
        body = await _body(request)
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in _HOP]
        unasked = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
        url = URL(self.server + request.raw_path, encoded=True)
        asked = self.session.request(request.method, url, headers=headers, data=body, skip_auto_headers=unasked)
        async with asked as answer:
            found = await answer.read()
            kept = [(name, value) for name, value in answer.headers.items() if name.lower() not in _HOP]
            if request.method != "HEAD":
                kept = [(name, value) for name, value in kept if name.lower() != "content-length"]
                kept.append(("Content-Length", str(len(found))))
            return answer.status, kept, found


async def _body(request: web.BaseRequest) -> bytes:
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return await request.content.read()


def _cut(
    request: web.BaseRequest, answer: web.StreamResponse | None = None, *, reset: bool = False
) -> web.StreamResponse:
    """End the connection, with what has been written of an answer."""
    if request.transport and reset:
        connection = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    elif request.transport:
        request.transport.close()  # once all is sent
    return answer or web.Response()
