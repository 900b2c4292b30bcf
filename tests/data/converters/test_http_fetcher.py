"""HttpFetcher against a real server that behaves as badly as servers do."""

from __future__ import annotations

import contextlib
import gzip
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_atum.data.converters.http_fetcher import FetchProblem, HttpFetcher, HttpOptions, _decoded, _is_public

BODY = b"image bytes " * 100
OPTIONS = HttpOptions(timeout=0.5, connect_timeout=0.5, retries=2, backoff=0.01, max_bytes=10_000, allow_private=True)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.connections: set[int] = set()
        self.busy = self.busiest = 0
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what is tested."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.asked[self.path] += 1
            self.server.headers.append(dict(self.headers))
            self.server.connections.add(self.client_address[1])
        with contextlib.suppress(OSError):
            getattr(self, self.path.strip("/").split("/")[0].replace("-", "_"))()

    def answer(self, status: int = 200, body: bytes = BODY, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def ok(self) -> None:
        self.answer()

    def busy(self) -> None:
        with self.server.lock:
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
        time.sleep(0.05)
        with self.server.lock:
            self.server.busy -= 1
        self.answer()

    def status(self) -> None:
        self.answer(int(self.path.rsplit("/", 1)[1]), b"sorry")

    def flaky(self) -> None:
        self.answer(503 if self.server.asked[self.path] < 3 else 200)

    def wait_please(self) -> None:
        first = self.server.asked[self.path] == 1
        self.answer(429 if first else 200, Retry_After=self.path.rsplit("/", 1)[1])

    def slow(self) -> None:
        time.sleep(3)

    def huge(self) -> None:
        self.answer(Content_Length=str(10**9))

    def unannounced(self) -> None:
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(bytes(4096))

    def endless_redirect(self) -> None:
        self.send_response(302)
        self.send_header("Location", "/ok")
        self.end_headers()
        while True:
            self.wfile.write(bytes(4096))

    def drip_body(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.drip(b"x")

    def drip_header(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        self.drip(b"X-Nothing: at all\r\n")

    def drip(self, data: bytes) -> None:
        for _ in range(60):
            self.wfile.write(data)
            self.wfile.flush()
            time.sleep(0.05)

    def two_lengths(self) -> None:
        self.answer(**{"content_length": "7"})

    def short(self) -> None:
        self.answer(Content_Length=str(len(BODY) + 10))
        self.close_connection = True

    def hang_up(self) -> None:
        self.close_connection = True

    def redirect(self) -> None:
        self.answer(301, b"", Location="/ok")

    def loop(self) -> None:
        self.answer(302, b"", Location="/loop")

    def to_file(self) -> None:
        self.answer(302, b"", Location="file:///etc/passwd")

    def zipped(self) -> None:
        self.answer(200, gzip.compress(BODY), Content_Encoding="gzip")

    def zip_bomb(self) -> None:
        self.answer(200, gzip.compress(bytes(5_000_000)), Content_Encoding="gzip")

    def no_ai(self) -> None:
        self.answer(X_Robots_Tag="nofollow, NoAI")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


def fetch(server: Server, path: str, **changes: object) -> bytes:
    return HttpFetcher(HttpOptions(**{**vars(OPTIONS), **changes})).fetch(server.url + path)  # type: ignore[arg-type]


def reason(url: str, **changes: object) -> str:
    with pytest.raises(FetchProblem) as problem:
        HttpFetcher(HttpOptions(**{**vars(OPTIONS), **changes})).fetch(url)  # type: ignore[arg-type]
    return problem.value.reason


@pytest.mark.parametrize("path", ["/ok", "/redirect", "/flaky", "/zipped", "/endless-redirect"])
def test_what_is_had(server: Server, path: str) -> None:
    assert fetch(server, path) == BODY


@pytest.mark.parametrize(
    ("path", "expected", "tries"),
    [
        ("/status/404", "http_404", 1),
        ("/status/403", "http_403", 1),
        ("/status/204", "http_204", 1),
        ("/status/500", "http_500", 3),
        ("/huge", "too_many_bytes", 1),
        ("/unannounced", "too_many_bytes", 1),
        ("/zip-bomb", "too_many_bytes", 1),
        ("/short", "connection", 3),
        ("/hang-up", "connection", 3),
        ("/two-lengths", "connection", 1),
        ("/loop", "too_many_redirects", 6),
        ("/to-file", "bad_url", 1),
        ("/no-ai", "opted_out", 1),
    ],
)
def test_reasons_and_tries(server: Server, path: str, expected: str, tries: int) -> None:
    assert reason(server.url + path) == expected
    assert server.asked[path] == tries


@pytest.mark.parametrize("path", ["/slow", "/drip-body", "/drip-header"])
def test_the_time_of_a_try_is_bounded(server: Server, path: str) -> None:
    start = time.monotonic()
    assert reason(server.url + path, retries=0, timeout=0.3) == "timeout"
    assert time.monotonic() - start < 1.5


def test_a_compressed_answer_is_not_unpacked_beyond_the_limit() -> None:
    bomb = gzip.compress(bytes(50_000_000))
    tracemalloc.start()
    with pytest.raises(FetchProblem, match="too_many_bytes"):
        _decoded(bomb, "gzip", 100_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_a_timeout_is_tried_again(server: Server) -> None:
    assert reason(server.url + "/slow", retries=1, timeout=0.1) == "timeout"
    assert server.asked["/slow"] == 2


def test_retry_after_is_kept_up_to_a_limit(server: Server) -> None:
    start = time.monotonic()
    assert fetch(server, "/wait-please/1") == BODY
    assert time.monotonic() - start >= 1
    assert reason(server.url + "/wait-please/3600") == "http_429"


def test_a_closed_port_and_an_unknown_name() -> None:
    assert reason("http://127.0.0.1:9/x.jpg") == "connection"
    assert reason("http://no-such-host.invalid/x.jpg", retries=0) == "dns"


@pytest.mark.parametrize(
    "url",
    ["", "x.jpg", "ftp://a.example/x", "file:///etc/passwd", "http://", "http://[::1/x", "http://a..b/x", "data:,x"],
)
def test_bad_urls(url: str) -> None:
    assert reason(url) == "bad_url"


def test_private_addresses_are_refused_unless_allowed(server: Server) -> None:
    assert reason(server.url + "/ok", allow_private=False) == "forbidden_address"
    assert reason(server.url.replace("127.0.0.1", "localhost") + "/ok", allow_private=False) == "forbidden_address"
    assert server.asked.total() == 0


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("10.0.0.1", False),
        ("169.254.169.254", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("::ffff:127.0.0.1", False),
        ("224.0.0.1", False),
        ("0.0.0.0", False),
        ("192.0.0.8", False),
        ("192.0.0.9", False),
        ("192.88.99.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::8.8.8.8", True),
        ("64:ff9b::10.0.0.1", False),
        ("64:ff9b::169.254.169.254", False),
        ("64:ff9b:1::8.8.8.8", False),
        ("2002:808:808::1", True),
        ("2002:7f00:1::1", False),
        ("2002:c000:9::1", False),
        ("::8.8.8.8", True),
        ("::127.0.0.1", False),
        ("::ffff:0:127.0.0.1", False),
        ("2001:0:808:808::f7f7:f7f7", False),
        ("fec0::1", False),
        ("fc00::1", False),
        ("3fff::1", False),
        ("5f00::1", False),
        ("ff0e::1", False),
        ("::", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert _is_public(address) == public


def test_a_host_is_not_asked_too_often_at_a_time(server: Server) -> None:
    fetcher = HttpFetcher(HttpOptions(**{**vars(OPTIONS), "per_host": 2}))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fetcher.fetch, [f"{server.url}/busy/{i}" for i in range(8)])) == [BODY] * 8
    assert server.busiest == 2


def test_no_credentials_are_sent(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    fetch(server, "/ok")
    assert "Authorization" not in server.headers[0]


def test_connections_are_used_again_and_the_agent_is_named(server: Server) -> None:
    fetcher = HttpFetcher(HttpOptions(**{**vars(OPTIONS), "user_agent": "mine/1"}))
    assert [fetcher.fetch(server.url + "/ok") for _ in range(4)] == [BODY] * 4
    assert len(server.connections) == 1
    assert server.headers[0]["User-Agent"] == "mine/1"
