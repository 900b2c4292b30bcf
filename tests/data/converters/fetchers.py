"""Fetchers for tests, by `tests.data.converters.fetchers:NAME`."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

from megatron_atum.data.converters.http_fetcher import FetchProblem
from tests.data.converters.files import jpeg


class Made:
    """An image made of the URL, after a while that the URL decides on. `lost` in a URL loses it."""

    def __init__(self, delay: str = "0") -> None:
        self.delay = float(delay)

    def fetch(self, url: str) -> bytes:
        number = hashlib.sha256(url.encode()).digest()[0]
        time.sleep(self.delay * number / 255)
        if "lost" in url:
            raise FetchProblem("http_404")
        return jpeg(number, 40 + number % 7)


class Offline(Made):
    """A network that is away while the file `switch` is there: every URL with `here` fails in one of these ways."""

    def __init__(self, switch: str, reasons: str) -> None:
        super().__init__()
        self.switch, self.reasons = Path(switch), reasons.split()

    def fetch(self, url: str) -> bytes:
        if self.switch.exists() and "here" in url:
            raise FetchProblem(self.reasons[hashlib.sha256(url.encode()).digest()[0] % len(self.reasons)])
        return super().fetch(url)


class Dying:
    def fetch(self, url: str) -> bytes:
        os._exit(7)


class Buggy:
    def fetch(self, url: str) -> bytes:
        raise KeyError("a bug")


class Counting(Made):
    asked = 0
    lock = threading.Lock()

    def fetch(self, url: str) -> bytes:
        with Counting.lock:
            Counting.asked += 1
        return super().fetch(url)


class Waiting(Made):
    """Says that it was asked, and then takes longer than anyone waits."""

    def __init__(self, sign: str) -> None:
        super().__init__()
        self.sign = Path(sign)

    def fetch(self, url: str) -> bytes:
        own = self.sign.with_name(f"{self.sign.name}-{os.getpid()}-{threading.get_ident()}")
        own.write_text(str(os.getpid()))
        own.replace(self.sign)  # others come here too: the file must never be empty
        time.sleep(600)
        return b""
