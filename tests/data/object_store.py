"""A moto server behind a proxy that counts, and fails when told to."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import requests
from moto.server import ThreadedMotoServer

CONTENT = np.random.default_rng(0).bytes(300_000)
SHARD = "s3://shards/set/a.tar"


@dataclass
class Proxy:
    """What passes between s3fs and moto."""

    requests: list[tuple[str, str, str | None, int]] = field(default_factory=list)  # method, path, Range, bytes sent
    failures: list[str] = field(default_factory=list)  # of the next requests

    def sent(self, method: str) -> list[tuple[str | None, int]]:
        return [(ranged, size) for verb, _, ranged, size in self.requests if verb == method]


def make_handler(proxy: Proxy, target: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            failure = proxy.failures.pop(0) if proxy.failures else ""
            if failure in ("reset", "hang"):
                time.sleep(0.5 if failure == "hang" else 0)
                self.connection.close()
                self.close_connection = True
            elif failure.isdigit():
                self.answer(int(failure), {}, b"")
            elif failure == "cut":
                self.pass_on(body, cut=True)
            elif failure:
                status, code = failure.split()
                self.answer(int(status), {}, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())
            else:
                self.pass_on(body)

        def pass_on(self, body: bytes, cut: bool = False) -> None:
            connection = http.client.HTTPConnection(target)
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            self.answer(response.status, dict(response.getheaders()), response.read(), cut)
            connection.close()

        def answer(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
            proxy.requests.append((self.command, self.path, self.headers.get("Range"), len(body)))
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            size = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
            self.send_header("Content-Length", size)
            self.end_headers()
            self.close_connection = self.close_connection or cut
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if cut else body)

        def log_message(self, *args: Any) -> None: ...

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    return Handler


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    """A server with the bucket `shards`, reached by the usual variables."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    target = "{}:{}".format(*moto.get_host_and_port())
    requests.put(f"http://{target}/shards", timeout=10)
    for name in ("set/a.tar", "set/b.tar", "set/deep/c.tar", "set/note.txt"):
        requests.put(f"http://{target}/shards/{name}", CONTENT, timeout=10)
    proxy = Proxy()
    front = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(proxy, target))
    front.daemon_threads = True
    threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{front.server_port}")
        for name, value in {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}.items():
            patch.setenv(f"AWS_{name}", value)
        yield proxy
    front.shutdown()
    front.server_close()
    moto.stop()


@pytest.fixture
def proxy(server: Proxy) -> Proxy:
    server.requests, server.failures = [], []
    return server
