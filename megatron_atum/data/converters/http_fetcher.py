"""Images over HTTP from servers nobody vouches for: everything they can do is bounded."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import requests.adapters
import urllib3
import urllib3.connection
import urllib3.connectionpool
import urllib3.exceptions

from megatron_atum import __version__
from megatron_atum.data.converters.reencode import ImageProblem

CHUNK = 65536  # bytes of one read
MAX_REDIRECTS = 5
MAX_WAIT = 30.0  # seconds: a server that asks for more is not asked again
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
# Not public, whatever Python's tables say: of protocols (their relays among them), and documentation.
NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20")))
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that is handed out
OPT_OUT = frozenset({"noai", "noimageai", "noindex", "noimageindex"})  # of the header X-Robots-Tag


class FetchProblem(ImageProblem):
    """An image that its URL did not give."""


class TransientProblem(FetchProblem):
    """One that may be over in `wait` seconds (None: not said)."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class HttpOptions:
    """Times in seconds."""

    connect_timeout: float = 5.0
    timeout: float = 30.0  # of one try, from the first byte sent to the last received
    retries: int = 2
    backoff: float = 1.0  # before the first retry; doubles
    max_bytes: int = 20_000_000
    per_host: int = 8  # requests to one host at a time, in one process
    user_agent: str = f"megatron-atum/{__version__}"
    allow_private: bool = False  # addresses of this machine and of private networks


class HttpFetcher:
    """`fetch` raises FetchProblem with one of these reasons: bad_url, forbidden_address, dns, connection, tls,
    timeout, http_STATUS, too_many_redirects, too_many_bytes, opted_out."""

    def __init__(self, options: HttpOptions) -> None:
        self._options = options
        self._sessions = threading.local()  # a session is not made for several threads
        self._hosts = _HostLimit(options.per_host)

    def fetch(self, url: str) -> bytes:
        for tried in range(self._options.retries + 1):
            try:
                return self._try(url)
            except TransientProblem as problem:
                wait = self._options.backoff * 2**tried if problem.wait is None else problem.wait
                if tried == self._options.retries or wait > MAX_WAIT:
                    raise
                time.sleep(wait)
        raise AssertionError("unreachable: the last try returns or raises")

    def _try(self, url: str) -> bytes:
        left = self._options.timeout  # waiting for a busy host does not count
        for _ in range(MAX_REDIRECTS + 1):
            with self._hosts.slot(_host(url)):
                start = time.monotonic()
                answer = self._get(url, start + left)
            left -= time.monotonic() - start
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise FetchProblem("too_many_redirects")

    def _get(self, url: str, deadline: float) -> bytes | str:
        """The body, or the URL that the server points to."""
        _request.deadline, _request.allow_private = deadline, self._options.allow_private
        timeout = (self._options.connect_timeout, max(0.01, deadline - time.monotonic()))
        session = self._session()
        with _problems(deadline):
            response = session.get(url, stream=True, allow_redirects=False, timeout=timeout)
            try:
                if time.monotonic() >= deadline:
                    raise TransientProblem("timeout")  # a header that was cut looks like a complete one
                if target := session.get_redirect_target(response):
                    return urljoin(url, target)
                _check_status(response)
                return _body(response, deadline, self._options.max_bytes)
            finally:
                response.close()

    def _session(self) -> requests.Session:
        if not hasattr(self._sessions, "session"):
            session = _Session()
            session.headers.update({"User-Agent": self._options.user_agent, "Accept": "image/*,*/*;q=0.5"})
            session.headers["Accept-Encoding"] = "identity"
            session.auth = _no_credentials
            session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
            for scheme in ("http://", "https://"):
                session.mount(scheme, _GuardedAdapter())
            self._sessions.session = session
        found: requests.Session = self._sessions.session
        return found


class _Session(requests.Session):
    """Follows no redirection: requests reads the body of one to its end, however long it is, even if told not to."""

    def resolve_redirects(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        return iter(())


def _no_credentials(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """In place of those that requests would take from ~/.netrc."""
    return request


# What this thread is asking for: a connection is made deep inside urllib3, which has no place to hand it through.
_request = threading.local()


class _Guarded:
    """A connection that refuses private addresses and whose header has a deadline."""

    sock: socket.socket

    def _new_conn(self) -> socket.socket:
        # Checked here and not by a look-up of our own before: a name can have another address the next time.
        sock: socket.socket = super()._new_conn()  # type: ignore[misc]
        if not _request.allow_private and not _is_public(sock.getpeername()[0]):
            sock.close()
            raise FetchProblem("forbidden_address")
        return sock

    def getresponse(self) -> Any:
        with _cut_at(_request.deadline, self.sock):
            return super().getresponse()  # type: ignore[misc]


class _HttpConnection(_Guarded, urllib3.connection.HTTPConnection):
    pass


class _HttpsConnection(_Guarded, urllib3.connection.HTTPSConnection):
    pass


class _HttpPool(urllib3.connectionpool.HTTPConnectionPool):
    ConnectionCls = _HttpConnection


class _HttpsPool(urllib3.connectionpool.HTTPSConnectionPool):
    ConnectionCls = _HttpsConnection


class _GuardedAdapter(requests.adapters.HTTPAdapter):
    """A proxy of the environment keeps its own rules on addresses: it makes the connection."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}


class _HostLimit:
    """At most so many requests to one host at a time."""

    def __init__(self, limit: int) -> None:
        self._limit, self._busy, self._changed = limit, Counter[str](), threading.Condition()

    @contextlib.contextmanager
    def slot(self, host: str) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._busy[host] < self._limit)
            self._busy[host] += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy[host] -= 1
                if not self._busy[host]:
                    del self._busy[host]  # there are millions of hosts
                self._changed.notify_all()


def _host(url: str) -> str:
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise FetchProblem("bad_url")
    return host


def _is_public(address: str) -> bool:
    found = _unwrapped(ipaddress.ip_address(address.partition("%")[0]))
    if isinstance(found, ipaddress.IPv6Address) and found not in GLOBAL_UNICAST:
        return False
    return found.is_global and not found.is_multicast and not any(found in network for network in NOT_PUBLIC)


def _unwrapped(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The IPv4 address that an IPv6 address leads to, through a translator or a tunnel; else the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        bits = int(address)
        if bits >> 32 in (0, 0xFFFF, 0x64FF9B << 64):  # ::a.b.c.d, ::ffff:a.b.c.d, NAT64
            return ipaddress.IPv4Address(bits & 0xFFFFFFFF)
        if bits >> 112 == 0x2002:  # 6to4
            return ipaddress.IPv4Address(bits >> 80 & 0xFFFFFFFF)
    return address


@contextlib.contextmanager
def _cut_at(deadline: float, sock: socket.socket) -> Iterator[None]:
    """Ends the connection at the deadline. Timeouts of a socket are no help against a byte every few seconds."""
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), _shut, (sock,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _check_status(response: requests.Response) -> None:
    if response.status_code in TRANSIENT:
        raise TransientProblem(f"http_{response.status_code}", _retry_after(response))
    if response.status_code != 200:
        raise FetchProblem(f"http_{response.status_code}")
    robots = {word.strip().lower() for word in response.headers.get("x-robots-tag", "").split(",")}
    if robots & OPT_OUT:
        raise FetchProblem("opted_out")


def _retry_after(response: requests.Response) -> float | None:
    value = response.headers.get("retry-after", "").strip()
    return float(value) if value.isdecimal() else None


def _body(response: requests.Response, deadline: float, max_bytes: int) -> bytes:
    length = response.headers.get("content-length", "").strip()
    if length.isdecimal() and int(length) > max_bytes:
        raise FetchProblem("too_many_bytes")
    body = bytearray()
    while data := response.raw.read1(CHUNK, decode_content=False):
        body += data
        if len(body) > max_bytes:
            raise FetchProblem("too_many_bytes")
        if time.monotonic() > deadline:
            raise TransientProblem("timeout")
    return _decoded(bytes(body), response.headers.get("content-encoding", "identity").strip().lower(), max_bytes)


def _decoded(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Some servers compress although they were asked not to. Never more than the limit is unpacked."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        return body  # a wrong one shows when the image is decoded
    try:
        content = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body, max_bytes + 1)
    except zlib.error:
        return body
    if len(content) > max_bytes:
        raise FetchProblem("too_many_bytes")
    return content


@contextlib.contextmanager
def _problems(deadline: float) -> Iterator[None]:
    """The errors of requests and urllib3 as problems. A connection that was cut at the deadline is a timeout."""
    try:
        yield
    except ImageProblem:
        raise
    except (requests.Timeout, urllib3.exceptions.TimeoutError) as error:
        raise TransientProblem("timeout") from error
    except requests.exceptions.InvalidHeader as error:
        raise FetchProblem("connection") from error
    except requests.exceptions.SSLError as error:
        raise FetchProblem("tls") from error
    except ValueError as error:  # of requests and urllib3 about URLs, and names that are no host names
        raise FetchProblem("bad_url") from error
    except (OSError, urllib3.exceptions.HTTPError, HTTPException) as error:  # requests' errors are OSErrors
        if time.monotonic() >= deadline:
            raise TransientProblem("timeout") from error
        raise _connection_problem(error) from error


def _connection_problem(error: BaseException) -> FetchProblem:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, socket.gaierror):
            unsettled = cause.errno == socket.EAI_AGAIN
            return TransientProblem("dns") if unsettled else FetchProblem("dns")
        cause = cause.__cause__ or cause.__context__
    return TransientProblem("connection")
