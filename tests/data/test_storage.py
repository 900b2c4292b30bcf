"""Storage, on local files and on a moto server behind a proxy that counts, and fails when told to."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import botocore.exceptions
import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from megatron_atum.data import storage as core
from megatron_atum.data.storage import ForbiddenFile, MissingFile, Storage, folder_of, is_remote, join, list_files
from megatron_atum.errors import DataError
from tests.data.object_store import CONTENT, SHARD, Proxy, proxy, server

__all__ = ["proxy", "server"]  # fixtures


@pytest.fixture(scope="module")
def client(server: Proxy) -> Storage:
    return Storage(tries=4, first_wait_s=0.001)


@pytest.fixture
def s3(client: Storage, proxy: Proxy) -> Storage:
    """One for all tests, since a client of botocore takes a third of a second."""
    client.retries = 0
    return client


@pytest.fixture
def quick() -> Storage:
    return Storage(tries=4, first_wait_s=0.001)


@pytest.fixture
def shard(tmp_path: Path) -> str:
    path = tmp_path / "a.tar"
    path.write_bytes(CONTENT)
    return str(path)


# paths ---------------------------------------------------------------------------------------------------------------


def test_paths():
    assert is_remote("s3://b/k") and is_remote("memory://k") and not is_remote("/a/b") and not is_remote("a:b")
    assert join("s3://b/d/", "k") == join("s3://b/d", "k") == "s3://b/d/k" and join("/d", "k") == "/d/k"
    assert join("/d", "s3://b/k") == "s3://b/k" and join("s3://b/d", "") == "s3://b/d/"
    assert folder_of("s3://b/d/k") == "s3://b/d" and folder_of("/d/k") == "/d"
    assert join(folder_of("k"), "other") == "other"


def test_list_local_files(tmp_path: Path):
    for name in ("b.tar", "a.tar", "deep/er/c.tar", "a[1].tar", "folder.tar/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def names(pattern: str) -> list[str]:
        return [os.path.relpath(path, tmp_path) for path in list_files(f"{tmp_path}/{pattern}")]

    assert names("*.tar") == ["a.tar", "a[1].tar", "b.tar"]
    assert names("**/*.tar") == ["a.tar", "a[1].tar", "b.tar", "deep/er/c.tar"]
    assert names("a[1].tar") == ["a[1].tar"] and names("gone*") == names("gone") == []


def test_list_objects(proxy: Proxy, s3: Storage):
    assert list_files("s3://shards/set/*.tar") == ["s3://shards/set/a.tar", "s3://shards/set/b.tar"]
    assert s3.list_remote("s3://shards/**/c.tar") == ["s3://shards/set/deep/c.tar"]
    assert s3.list_remote(SHARD) == [SHARD]
    assert s3.list_remote("s3://shards/set") == s3.list_remote("s3://shards/x*") == s3.list_remote("s3://gone/*") == []


def test_list_objects_despite_errors_or_say_so(proxy: Proxy, s3: Storage):
    proxy.failures = ["503 SlowDown", "reset", "reset"]
    assert len(s3.list_remote("s3://shards/set/*.tar")) == 2
    assert s3.retries == 2
    proxy.failures = ["403 AccessDenied"]
    with pytest.raises(MissingFile, match=r"s3://shards/set/\*\.tar may not be read"):
        s3.list_remote("s3://shards/set/*.tar")


# object stores -------------------------------------------------------------------------------------------------------


def test_a_read_asks_for_its_bytes_only(proxy: Proxy, s3: Storage):
    assert s3.read(SHARD, 1000, 100) == CONTENT[1000:1100]
    assert proxy.requests == [("GET", "/shards/set/a.tar", "bytes=1000-1099", 100)]
    assert s3.read(SHARD, 0, 0) == b"" and len(proxy.requests) == 1


def test_objects(proxy: Proxy, s3: Storage):
    assert s3.size(SHARD) == len(CONTENT) and s3.read_all(SHARD) == CONTENT
    assert s3.exists(SHARD) and not s3.exists("s3://shards/set/gone") and not s3.exists("s3://shards/set")
    s3.write("s3://shards/new/x.json", b"one")
    s3.write("s3://shards/new/x.json", b"other")
    assert s3.read_all("s3://shards/new/x.json") == b"other"
    assert len(proxy.sent("PUT")) == 2 and s3.retries == 0


@pytest.mark.parametrize(
    "failure", ["503", "500", "429", "502", "503 SlowDown", "500 InternalError", "400 RequestTimeout", "reset", "cut"]
)
def test_transient_errors_of_a_server(failure: str, proxy: Proxy, s3: Storage):
    proxy.failures = [failure] * (4 if failure == "reset" else 2)  # aiohttp meets a first reset by itself
    assert s3.read(SHARD, 1000, 50_000) == CONTENT[1000:51_000]
    assert proxy.failures == [] and s3.retries == 2


@pytest.mark.alone
def test_a_server_that_does_not_answer(proxy: Proxy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(core.S3_OPTIONS["config_kwargs"], "read_timeout", 0.1)  # seconds
    storage = Storage(tries=2, first_wait_s=0.001)
    proxy.failures = ["hang"]
    assert storage.read(SHARD, 0, 10) == CONTENT[:10] and storage.retries == 1


def test_a_write_is_tried_again(proxy: Proxy, s3: Storage):
    proxy.failures = ["503", "reset", "reset"]
    s3.write("s3://shards/new", b"x")
    assert s3.read_all("s3://shards/new") == b"x" and s3.retries == 2


def test_an_outage_names_path_error_and_tries(proxy: Proxy, s3: Storage):
    proxy.failures = ["503 SlowDown"] * 9
    with pytest.raises(DataError, match=r"s3://shards/set/a\.tar cannot be read, 4 tries failed: OSError.*check"):
        s3.read(SHARD, 0, 10)
    assert len(proxy.failures) == 5 and s3.retries == 4  # no layer below tries by itself


def test_a_server_that_is_gone(monkeypatch: pytest.MonkeyPatch, proxy: Proxy, quick: Storage):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"a\.tar cannot be read, 4 tries failed: .*Connect") as caught:
        quick.read(SHARD, 0, 10)
    assert not isinstance(caught.value, MissingFile)


@pytest.mark.parametrize("path", ["s3://shards/set/gone.tar", "s3://gone/a.tar", "s3://shards/set"])
def test_what_does_not_exist_is_not_waited_for(path: str, proxy: Proxy, s3: Storage):
    for call in (lambda: s3.size(path), lambda: s3.read(path, 0, 1), lambda: s3.open(path)):
        with pytest.raises(MissingFile, match=path):
            call()
    assert s3.retries == 0


REFUSALS = ["403 AccessDenied", "400 ExpiredToken", "400 InvalidToken", "403 Unknown", "403", "401", "400"]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_not_waited_for_and_not_taken_for_a_loss(refusal: str, proxy: Proxy, s3: Storage):
    message = r"a\.tar may not be read, access was refused .*check the credentials.*S3 refuses missing files too"
    proxy.failures = [refusal]
    with pytest.raises(ForbiddenFile, match=message):
        s3.read(SHARD, 0, 10)
    for call in (lambda: s3.size(SHARD), lambda: s3.exists(SHARD)):
        proxy.failures = [refusal] * 3  # at 400, botocore looks for the bucket in other regions
        with pytest.raises(ForbiddenFile, match=message):
            call()
    proxy.failures = [refusal]
    with pytest.raises(DataError, match=r"new may not be written, access was refused .*permissions") as caught:
        s3.write("s3://shards/new", b"x")
    assert not isinstance(caught.value, MissingFile) and s3.retries == 0


@pytest.mark.parametrize("failure", ["404 NoSuchKey", "404 NoSuchBucket", "404", "410"])
def test_what_is_gone_is_not_forbidden(failure: str, proxy: Proxy, s3: Storage):
    proxy.failures = [failure]
    with pytest.raises(MissingFile, match=r"a\.tar does not exist") as caught:
        s3.read(SHARD, 0, 10)
    assert not isinstance(caught.value, ForbiddenFile) and s3.retries == 0


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SECRET_ACCESS_KEY": ""}, "PartialCredentialsError.*; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ({"ACCESS_KEY_ID": "", "SECRET_ACCESS_KEY": ""}, "NoCredentialsError.*; set AWS_ACCESS_KEY_ID"),
        ({"PROFILE": "nobody"}, "ProfileNotFound.*; correct AWS_PROFILE"),
        ({"ENDPOINT_URL": "nowhere"}, "Invalid endpoint: nowhere.*; correct AWS_ENDPOINT_URL"),
    ],
)
def test_wrong_settings_are_no_outage(
    variables: dict[str, str], message: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(f"AWS_{name}", value)
        if not value:
            monkeypatch.delenv(f"AWS_{name}")
    storage = Storage(tries=4, first_wait_s=0.001)
    with pytest.raises(DataError, match=rf"(?s)a\.tar cannot be read \(.*{message}") as caught:
        storage.read(SHARD, 0, 10)
    assert not isinstance(caught.value, MissingFile) and storage.retries == 0 and proxy.requests == []


def test_a_bucket_that_cannot_be_one(proxy: Proxy, s3: Storage):
    with pytest.raises(
        DataError, match=r"(?s)cannot be read \(ParamValidationError.*; correct the path, s3://BUCKET/KEY"
    ):
        s3.read("s3://A B/a.tar", 0, 10)
    assert s3.retries == 0


@pytest.mark.parametrize("name", ["CredentialRetrievalError", "MetadataRetrievalError", "EndpointConnectionError"])
def test_credentials_that_cannot_be_had_just_now_are_waited_for(
    name: str, proxy: Proxy, s3: Storage, monkeypatch: pytest.MonkeyPatch
):
    facts = {"provider": "iam-role", "error_msg": "timed out", "endpoint_url": "http://x"}
    errors = [getattr(botocore.exceptions, name)(**facts)]
    system = s3._system(SHARD)
    cat = system.cat_file

    def cat_file(*args: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop()
        return cat(*args, **options)

    monkeypatch.setattr(system, "cat_file", cat_file)
    assert s3.read(SHARD, 0, 10) == CONTENT[:10] and s3.retries == 1


@pytest.mark.parametrize("offset", [len(CONTENT) - 5, len(CONTENT), len(CONTENT) + 100])
@pytest.mark.parametrize("remote", [True, False])
def test_a_file_that_became_shorter(offset: int, remote: bool, proxy: Proxy, s3: Storage, shard: str):
    path = SHARD if remote else shard
    assert s3.read(path, len(CONTENT) - 5, 5) == CONTENT[-5:]
    with pytest.raises(DataError, match=rf"a\.tar ends before byte {offset + 10}: it changed since it was indexed"):
        s3.read(path, offset, 10)
    assert s3.retries == 0


def test_a_short_answer_is_not_a_short_file(quick: Storage, monkeypatch: pytest.MonkeyPatch):
    quick.write("memory://x", CONTENT)
    system = quick._system("memory://x")
    cat, answers = system.cat_file, [b"short"]
    monkeypatch.setattr(system, "cat_file", lambda *a, **k: answers.pop() if answers else cat(*a, **k))
    assert quick.read("memory://x", 5, 100) == CONTENT[5:105] and quick.retries == 1


def test_any_scheme_of_fsspec(quick: Storage):
    quick.write("memory://set/a.tar", CONTENT)
    assert quick.read("memory://set/a.tar", 7, 9) == CONTENT[7:16]
    (path,) = list_files("memory://set/*.tar")
    assert quick.read_all(path) == CONTENT


def test_a_scheme_that_nobody_knows(quick: Storage):
    with pytest.raises(DataError, match=r"nope://a/b: Protocol not known"):
        quick.size("nope://a/b")
    assert quick.retries == 0


def test_without_fsspec(monkeypatch: pytest.MonkeyPatch, quick: Storage):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(DataError, match=r"pip install megatron_atum\[data\]"):
        quick.size(SHARD)


def test_local_paths_do_not_import_fsspec(shard: str):
    code = (
        "import sys; from megatron_atum.data.storage import Storage, list_files; "
        f"Storage().read({shard!r}, 0, 9), list_files({shard!r}); sys.exit('fsspec' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# processes -----------------------------------------------------------------------------------------------------------


def in_child(action: Callable[[], bytes]) -> bytes:
    """Result of an action in a forked process, which is killed when it hangs."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            os.write(writer, action())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        result = stream.read()
    os.waitpid(child, 0)
    return result


def test_a_forked_process_reads_too(proxy: Proxy, s3: Storage, shard: str):
    """The parent's io thread, connections and descriptors are of no use to the child, nor the child's to the parent."""
    for path in (SHARD, shard):
        s3.read(path, 0, 10)

    def read() -> bytes:
        s3.read(shard, 0, 9)
        s3.close()  # must not close what is the parent's
        return s3.read(SHARD, 5, 20) + Storage().read(SHARD, 25, 5) + s3.read(shard, 30, 5)

    assert in_child(read) == CONTENT[5:35]
    assert s3.read(SHARD, 5, 20) == s3.read(shard, 5, 20) == CONTENT[5:25]
    assert in_child(lambda: in_child(read)) == CONTENT[5:35]
    assert s3.retries == 0


class Slices(Dataset[bytes]):
    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> bytes:
        return self.storage.read(SHARD, 100 * number, 100)


def test_workers_of_a_loader_read_too(proxy: Proxy, s3: Storage):
    s3.read(SHARD, 0, 10)
    loader = DataLoader(Slices(s3), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert b"".join(loader) == CONTENT[:800]
    assert s3.read(SHARD, 0, 10) == CONTENT[:10]


def test_a_pickled_copy_starts_afresh(shard: str, quick: Storage, s3: Storage):
    quick.read(shard, 0, 10)
    s3.read(SHARD, 0, 10)
    quick._systems.update(s3._systems)
    copy = pickle.loads(pickle.dumps(quick))
    assert (copy.tries, copy.first_wait_s) == (4, 0.001)
    quick.close()
    assert copy.read(shard, 0, 10) == copy.read(SHARD, 0, 10) == quick.read(shard, 0, 10) == CONTENT[:10]


# local files ---------------------------------------------------------------------------------------------------------


class Flaky:
    """os.pread (or another function of os) that fails with the next of these errors, and then works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, *errors: int) -> None:
        self.errors, self.calls, self.function = list(errors), 0, getattr(os, name)
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        if self.errors:
            raise OSError(self.errors.pop(0), "injected")
        return self.function(*args, **options)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EAGAIN, errno.ETIMEDOUT])
def test_transient_errors_of_a_file_system(number: int, shard: str, quick: Storage, monkeypatch: pytest.MonkeyPatch):
    Flaky(monkeypatch, "pread", number, number)
    opened = Flaky(monkeypatch, "open")
    assert quick.read(shard, 50, 10) == CONTENT[50:60]
    assert quick.retries == 2 and opened.calls == 3  # a stale handle needs the file to be opened anew


def test_a_disk_that_stays_broken(shard: str, quick: Storage, monkeypatch: pytest.MonkeyPatch):
    flaky = Flaky(monkeypatch, "pread", *[errno.EIO] * 9)
    with pytest.raises(DataError, match=r"a\.tar cannot be read, 4 tries failed: OSError: \[Errno 5\] injected"):
        quick.read(shard, 0, 10)
    assert flaky.calls == 4


def test_files_that_cannot_be_read(shard: str, quick: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for path in (shard + ".gone", shard + "/below"):
        with pytest.raises(MissingFile, match=path):
            quick.read(path, 0, 1)
        assert not quick.exists(path)
    with pytest.raises(MissingFile, match="is a folder"):
        quick.size(str(tmp_path))
    Flaky(monkeypatch, "open", errno.EACCES)
    with pytest.raises(ForbiddenFile, match=r"may not be read, access was refused .*correct its permissions$"):
        quick.read(shard, 0, 1)
    Flaky(monkeypatch, "stat", errno.EACCES)
    with pytest.raises(ForbiddenFile, match="access was refused"):
        quick.exists(shard)
    Flaky(monkeypatch, "open", errno.EMFILE)
    with pytest.raises(DataError, match=r"a\.tar cannot be read \(OSError: \[Errno 24\]"):
        quick.read(shard, 0, 1)
    assert quick.retries == 0


def test_a_bug_is_no_data_error(shard: str, quick: Storage, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(TypeError):
        quick.read(shard, "0", 1)  # type: ignore[arg-type]


def test_the_least_recently_used_file_is_closed(tmp_path: Path, quick: Storage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(core, "OPEN_FILES", 2)
    opened, closed = Flaky(monkeypatch, "open"), Flaky(monkeypatch, "close")
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
    for name, files in (("a", 1), ("b", 2), ("a", 2), ("c", 3), ("a", 3), ("b", 4)):  # c takes the place of b
        assert quick.read(str(tmp_path / name), 0, 1) == name.encode()
        assert opened.calls == files
    quick.close()
    assert closed.calls == 4


def test_a_read_in_pieces(shard: str, quick: Storage, monkeypatch: pytest.MonkeyPatch):
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 7), offset))
    assert quick.read(shard, 3, 100) == CONTENT[3:103]


# waiting -------------------------------------------------------------------------------------------------------------


def test_waits_double_up_to_a_bound_and_draw_from_no_global_state(shard: str, monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    Flaky(monkeypatch, "pread", *[errno.EIO] * 9)
    before = random.getstate(), np.random.get_state()[1].tolist()
    Storage(tries=10, first_wait_s=1.0).read(shard, 0, 1)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    longest = [1, 2, 4, 8, 16, 30, 30, 30, 30]
    assert len(waits) == 9 and all(m / 2 <= wait <= m for m, wait in zip(longest, waits, strict=True))
    assert len(set(waits)) == 9


def test_by_default_an_outage_of_half_a_minute_passes(shard: str, monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    Flaky(monkeypatch, "pread", *[errno.EIO] * 99)
    with pytest.raises(DataError, match="8 tries failed"):
        Storage().read(shard, 0, 1)
    assert 30 < sum(waits) < 65


# streams -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remote", [True, False])
def test_a_stream_goes_on_where_an_error_struck(
    remote: bool, proxy: Proxy, s3: Storage, shard: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(core, "LOCAL_BLOCK", 1000)
    monkeypatch.setattr(core, "REMOTE_BLOCK", 100_000)
    with s3.open(SHARD if remote else shard) as stream:
        assert stream.read(500) == CONTENT[:500]
        proxy.failures = ["503", "cut"]
        Flaky(monkeypatch, "pread", errno.ESTALE, errno.EIO)
        assert stream.read() == CONTENT[500:]
        assert s3.retries == 2 and len(proxy.sent("GET")) <= 4  # no range is asked for in small pieces
        assert stream.seek(-10, io.SEEK_END) == len(CONTENT) - 10 and stream.read() == CONTENT[-10:]
        assert stream.seek(5) == 5 and stream.read(5) == CONTENT[5:10]


def test_a_stream_serves_tarfile(s3: Storage, proxy: Proxy):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in "xy":
            info = tarfile.TarInfo(name)
            info.size = len(CONTENT)
            tar.addfile(info, io.BytesIO(CONTENT))
    s3.write("s3://shards/t.tar", buffer.getvalue())
    with s3.open("s3://shards/t.tar") as stream, tarfile.open(fileobj=stream) as tar:
        assert [(info.name, info.size) for info in tar] == [("x", len(CONTENT)), ("y", len(CONTENT))]


# writing -------------------------------------------------------------------------------------------------------------


def test_a_write_replaces_as_a_whole(tmp_path: Path, quick: Storage, monkeypatch: pytest.MonkeyPatch):
    path = str(tmp_path / "new" / "x.json")
    quick.write(path, b"one")
    assert quick.read(path, 0, 3) == b"one"
    quick.write(path, b"two")
    assert quick.read(path, 0, 3) == b"two"  # not from the file that was open
    Flaky(monkeypatch, "fsync", errno.ENOSPC)
    with pytest.raises(DataError, match=r"x\.json cannot be written \(OSError: \[Errno 28\] injected\)"):
        quick.write(path, b"three")
    assert quick.read_all(path) == b"two" and os.listdir(tmp_path / "new") == ["x.json"]
    Flaky(monkeypatch, "fsync", errno.EIO, errno.ESTALE)
    quick.write(path, b"four")
    assert quick.read_all(path) == b"four" and quick.retries == 2
