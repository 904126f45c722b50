"""An HTTP proxy in front of the S3 server that breaks a share of the requests in the ways networks and stores do.

It is transparent to signatures: method, path, query, headers (Host too) and body pass byte for byte, and it never
retries by itself.
"""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from urllib.parse import urlsplit

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, TCPConnector, hdrs, web
from yarl import URL

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n'
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
EXPIRED = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n'
    b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
)
KINDS = (
    "slow_down",  # 503 SlowDown without asking the server
    "reset_before",  # the connection is reset, the server never saw the request
    "reset_after",  # the server executed it, its answer is lost in a reset
    "hang",  # no answer, until the client gives up or `hang_seconds` are over, then a reset
    "truncate_response",  # half of the body that Content-Length promised, then a reset
    "truncate_request",  # the server receives half of the body, then both connections are reset
)
# Answers without asking the server. Expired credentials are no fault that passes, so they are not one of KINDS.
_ANSWERS = {"slow_down": (503, SLOW_DOWN), "expired": (400, EXPIRED)}
# What concerns one connection, and what aiohttp writes itself.
_HOP_BY_HOP = {"connection", "keep-alive", "expect", "transfer-encoding", "date", "server"}


class FaultProxy:
    """Starts on construction, on a loopback port of its own; `stop` ends its thread.

    Args:
        upstream: the server's endpoint, http://host:port.
        seed: of the choice which requests are hit, and how.

    Attributes:
        endpoint: the proxy's own.
        share: of the requests to hit, 0 to 1; may be set while it runs.
        kinds: to choose from, of KINDS, among those that the request can suffer.
        put_delay: seconds that a PUT waits before anything becomes of it; may be set while it runs, for those that wait
            too.
        counts: faults by kind, plus `passed` requests and those that found the server `down`.
    """

    def __init__(self, upstream: str, seed: int = 0, hang_seconds: float = 20.0):
        self.upstream, self.hang_seconds = upstream, hang_seconds
        self.share, self.kinds, self.put_delay = 0.0, tuple(KINDS), 0.0
        self.counts: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        self.endpoint = f"http://127.0.0.1:{port}"

    def hit(self, share: float, kinds: Sequence[str] = KINDS) -> None:
        """From now on hit this share of the requests with these kinds of faults; 0 is none."""
        if unknown := set(kinds) - {*KINDS, "expired"}:
            raise ValueError(f"unknown kinds {sorted(unknown)}; there are {', '.join(KINDS)} and expired")
        self.kinds, self.share = tuple(kinds), share

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> int:
        # Each request its own connection: a pooled one that has gone stale would fail where the server did not.
        self._session = ClientSession(
            connector=TCPConnector(force_close=True, limit=0),
            timeout=ClientTimeout(total=None, sock_connect=5),
            auto_decompress=False,
            skip_auto_headers=(hdrs.USER_AGENT, hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE),
        )
        self._server = web.Server(self._serve, auto_decompress=False, access_log=None)
        self._runner = web.ServerRunner(self._server, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return self._runner.addresses[0][1]

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._handle(request)
        except ConnectionError:  # the client was killed: nobody is left to answer
            return self._reset(request)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":  # botocore waits a second for it
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        body = await request.content.read()
        received = self._loop.time()
        while request.method == "PUT" and self._loop.time() < received + self.put_delay:
            await asyncio.sleep(0.05)
        kind = self._choose(request, body)
        if kind in _ANSWERS:
            self.counts[kind] += 1
            status, answer_body = _ANSWERS[kind]
            return web.Response(status=status, body=answer_body, content_type="application/xml")
        if kind == "reset_before":
            return self._reset(request, kind)
        if kind == "hang":
            self.counts[kind] += 1  # now: when it ends may be another window's time
            return await self._hang(request)
        if kind == "truncate_request":
            await self._send_half(request, body)
            return self._reset(request, kind)
        try:
            async with self._ask(request, body) as answer:
                data = await answer.read()
        except (OSError, ClientError):
            return self._reset(request, "down")
        if kind == "reset_after":
            return self._reset(request, kind)
        response = web.StreamResponse(status=answer.status, reason=answer.reason)
        for name, value in answer.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                response.headers.add(name, value)
        if kind == "truncate_response" and len(data) > 1:
            await response.prepare(request)
            await response.write(data[: len(data) // 2])
            return self._reset(request, kind)
        self.counts["passed"] += 1
        await response.prepare(request)
        await response.write(data)
        await response.write_eof()
        return response

    def _choose(self, request: web.BaseRequest, body: bytes) -> str | None:
        """The fault for a request, if it is to have one."""
        impossible = set()
        if request.method not in ("GET", "POST"):  # the others' answers have no body worth the name
            impossible.add("truncate_response")
        if len(body) < 2:
            impossible.add("truncate_request")
        possible = [kind for kind in self.kinds if kind not in impossible]
        if self._random.random() >= self.share or not possible:
            return None
        return self._random.choice(possible)

    def _ask(self, request: web.BaseRequest, body: bytes) -> contextlib.AbstractAsyncContextManager[ClientResponse]:
        url = URL(self.upstream + request.raw_path, encoded=True)
        return self._session.request(
            request.method, url, headers=self._headers(request), data=body or None, allow_redirects=False
        )

    def _headers(self, request: web.BaseRequest) -> list[tuple[str, str]]:
        return [(name, value) for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP]

    async def _send_half(self, request: web.BaseRequest, body: bytes) -> None:
        """The head as it came and half of the body that it announces, on a connection that then breaks."""
        where = urlsplit(self.upstream)
        head = [f"{request.method} {request.raw_path} HTTP/1.1"]
        head += [f"{name}: {value}" for name, value in self._headers(request)]
        with contextlib.suppress(OSError):  # a server that is down receives nothing, which is no other fault
            _, writer = await asyncio.open_connection(where.hostname, where.port)
            writer.write("\r\n".join([*head, "", ""]).encode("utf-8", "surrogateescape") + body[: len(body) // 2])
            await writer.drain()
            await asyncio.sleep(0.05)  # a reset that overtakes the data would leave the server with nothing
            _abort(writer.transport)

    async def _hang(self, request: web.BaseRequest) -> web.StreamResponse:
        deadline = self._loop.time() + self.hang_seconds
        while self._loop.time() < deadline and request.transport is not None:  # None: the client gave up
            await asyncio.sleep(0.1)
        return self._reset(request)

    def _reset(self, request: web.BaseRequest, kind: str | None = None) -> web.StreamResponse:
        """Reset the client's connection: nothing of what the handler returns can be sent any more."""
        if kind is not None:
            self.counts[kind] += 1
        if request.transport is not None:
            _abort(request.transport)
        return web.Response()


def _abort(transport: asyncio.BaseTransport) -> None:
    """Close with a reset (RST) instead of an orderly end."""
    with contextlib.suppress(OSError):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()  # type: ignore[attr-defined]
