"""Bytes of shards, from local paths and from object stores (`s3://`, or any `scheme://` that fsspec knows).

A read that fails for a reason that may pass is tried again for about a minute; it says nothing about the shard. A file
that is gone, or closed to us, is not waited for, nor are settings that are wrong. fsspec is imported when the first
remote path is used.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import random
import re
import secrets
import stat
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

from megatron_atum.errors import DataError

OPEN_FILES = 64  # most local files that are kept open
LONGEST_WAIT_S = 30.0
LOCAL_BLOCK, REMOTE_BLOCK = 256 << 10, 8 << 20  # bytes that a sequential reader asks for at once
TRANSIENT = {
    *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ETIMEDOUT, errno.EPIPE),
    *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENOTCONN, errno.ESHUTDOWN, errno.ENOBUFS),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
}
TRANSIENT_STATUS = {408, 425, 429}  # of HTTP, and all from 500 on
GONE_STATUS, REFUSED_STATUS = {404, 410}, {401, 403}
# S3's for credentials that it answers with status 400. An answer to HEAD has no body that could say more than "400".
REFUSED_CODES = {"400", "ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"}
NETWORK_PACKAGES = {"aiobotocore", "aiohttp", "asyncio", "botocore", "fsspec", "http", "s3fs", "ssl", "urllib3"}
# Of botocore's own errors those that may pass, with their subclasses. The others are about settings.
PASSING_ERRORS = {
    *("HTTPClientError", "ConnectionError", "IncompleteReadError", "ChecksumError", "FlexibleChecksumError"),
    *("CredentialRetrievalError", "MetadataRetrievalError", "TokenRetrievalError", "CapacityNotAvailableError"),
}
S3_OPTIONS = {
    # One try per call: tries are counted here, and three layers of retries would multiply.
    "config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 1}},
}

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_jitter = random.SystemRandom()  # the state of the other generators belongs to the run
_abandoned: list[Any] = []  # file systems of the process that this one was forked from
_T = TypeVar("_T")


class MissingFile(DataError):
    """A file that does not exist. Trying again does not help."""


class ForbiddenFile(MissingFile):
    """A file that may not be read. It may well be there: the credentials may be the wrong ones, or have expired."""


def is_remote(path: str) -> bool:
    return _URL.match(path) is not None


def join(folder: str, name: str) -> str:
    """Path of a file in a folder; the name may be a whole path or URL of its own."""
    if is_remote(name) or not is_remote(folder):
        return name if is_remote(name) else os.path.join(folder, name)
    return f"{folder.rstrip('/')}/{name}"


def folder_of(path: str) -> str:
    """Folder of a file, "" for a bare name, so that `join(folder_of(path), name)` is a sibling."""
    if not is_remote(path):
        return os.path.dirname(path)
    scheme, rest = path.split("://", 1)
    return f"{scheme}://{rest.rsplit('/', 1)[0]}"


def list_files(pattern: str) -> list[str]:
    """Sorted full paths of the files that a path or a glob (with `**`) names; [] if there are none.

    Raises:
        DataError: the storage cannot be reached, or does not let us list.
    """
    if is_remote(pattern):
        return Storage().list_remote(pattern)
    if os.path.isfile(pattern):  # also where its name has the signs of a glob
        return [pattern]
    return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))


class Storage:
    """Reads and writes files. To be used by one thread at a time; forked and pickled copies start afresh.

    All methods raise MissingFile (of which ForbiddenFile is a kind), or DataError when the storage fails for good or
    `tries` times in a row.
    """

    def __init__(self, tries: int = 8, first_wait_s: float = 0.5) -> None:
        """Args: first_wait_s: most seconds before the second try; the bound doubles, up to LONGEST_WAIT_S.

        A wait is at least half its bound, so that the defaults give up after 31 to 62 seconds of waiting.
        """
        self.tries, self.first_wait_s = tries, first_wait_s
        self.retries = 0  # transient errors so far
        self._pid = os.getpid()
        self._files: OrderedDict[str, int] = OrderedDict()  # local path -> descriptor, the least recently used first
        self._systems: dict[str, Any] = {}  # scheme -> fsspec file system

    def __getstate__(self) -> dict[str, Any]:
        return {"tries": self.tries, "first_wait_s": self.first_wait_s}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Storage.__init__(self, **state)

    # Reading ----------------------------------------------------------------------------------------------------------

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes. Raises DataError when the file is shorter."""
        data = self._persist(path, lambda: self._range(path, offset, size)) if size else b""
        if data is None:
            raise DataError(
                f"{path} ends before byte {offset + size}: it changed since it was indexed; restore it or index again"
            )
        return data

    def read_all(self, path: str) -> bytes:
        return self.read(path, 0, self.size(path))

    def size(self, path: str) -> int:
        """Bytes of a file."""
        return self._persist(path, lambda: self._size(path))

    def exists(self, path: str) -> bool:
        """Whether there is such a file. Raises ForbiddenFile when the storage refuses to tell."""
        try:
            self.size(path)
        except ForbiddenFile:
            raise
        except MissingFile:
            return False
        return True

    def open(self, path: str) -> BinaryIO:
        """The file from its start, buffered; seeking is allowed. A read that fails is tried again at its place."""
        return io.BufferedReader(_Ranges(self, path), REMOTE_BLOCK if is_remote(path) else LOCAL_BLOCK)

    def list_remote(self, pattern: str) -> list[str]:
        """`list_files` of a URL."""
        try:
            found = self._persist(pattern, lambda: self._system(pattern).glob(pattern, detail=True))
        except MissingFile as error:
            if isinstance(error.__cause__, FileNotFoundError):  # no such bucket
                return []
            raise
        names = [name for name, info in found.items() if info["type"] == "file"]
        return sorted(name if is_remote(name) else f"{_scheme(pattern)}://{name}" for name in names)

    def _range(self, path: str, offset: int, size: int) -> bytes | None:
        """Bytes of a file, or None when it is too short."""
        if not is_remote(path):
            return _pread(self._file(path), offset, size)
        try:
            data: bytes = self._system(path).cat_file(path, start=offset, end=offset + size)
        except OSError as error:
            # EINVAL: s3fs's number for a range that begins behind the end, and for some tokens that have expired.
            if error.errno != errno.EINVAL or _is_forbidden(error):
                raise
            data = b""
        if len(data) == size:
            return data
        if self._size(path) >= offset + size:
            raise ConnectionError(f"{len(data)} of {size} bytes came")
        return None

    def _size(self, path: str) -> int:
        if is_remote(path):
            info = self._system(path).info(path)
            is_folder, size = info["type"] == "directory", int(info["size"])
        else:
            found = os.stat(path)
            is_folder, size = stat.S_ISDIR(found.st_mode), found.st_size
        if is_folder:
            raise IsADirectoryError(errno.EISDIR, "is a folder", path)
        return size

    # Writing ----------------------------------------------------------------------------------------------------------

    def write(self, path: str, data: bytes) -> None:
        """The file is complete under its name or not there. A local folder is made where it is missing."""

        def put() -> None:
            if is_remote(path):
                self._system(path).pipe_file(path, data)
            else:
                _write_local(path, data)

        self._persist(path, put, verb="written")
        self._forget(path)

    # Files and file systems of this process ---------------------------------------------------------------------------

    def close(self) -> None:
        """Closes what is open; the next use opens it again."""
        self._enter_process()
        while self._files:
            os.close(self._files.popitem()[1])
        self._systems.clear()

    def _file(self, path: str) -> int:
        self._enter_process()
        if path not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[path] = os.open(path, os.O_RDONLY)
        self._files.move_to_end(path)
        return self._files[path]

    def _forget(self, path: str) -> None:
        file = self._files.pop(path, None)
        if file is not None:
            os.close(file)

    def _system(self, path: str) -> Any:
        self._enter_process()
        scheme = _scheme(path)
        if scheme not in self._systems:
            self._systems[scheme] = _make_system(scheme, path)
        return self._systems[scheme]

    def _enter_process(self) -> None:
        """After a fork: descriptors stay the parent's, and so do file systems, whose io thread was not forked."""
        if self._pid != os.getpid():
            # Kept from being collected: that would talk to the parent's loop.
            _abandoned.extend(self._systems.values())
            self._pid, self._files, self._systems = os.getpid(), OrderedDict(), {}

    # Trying again -----------------------------------------------------------------------------------------------------

    def _persist(self, path: str, action: Callable[[], _T], verb: str = "read") -> _T:
        """Result of an action on a file, tried again after transient errors."""
        for number in range(1, self.tries + 1):
            try:
                return action()
            except Exception as error:
                if not _is_transient(error):
                    final = _permanent(path, verb, error)
                    if final is None:
                        raise
                    raise final from error
                self.retries += 1
                self._enter_process()
                self._forget(path)
                if number == self.tries:
                    raise DataError(
                        f"{path} cannot be {verb}, {number} tries failed: {_text(error)}; "
                        "check that its storage is up and can be reached"
                    ) from error
            wait = min(LONGEST_WAIT_S, self.first_wait_s * 2 ** (number - 1))
            time.sleep(wait * _jitter.uniform(0.5, 1.0))
        raise ValueError(f"Storage(tries={self.tries}) never tries")


class _Ranges(io.RawIOBase):
    """A file as a stream, read range by range."""

    def __init__(self, storage: Storage, path: str) -> None:
        super().__init__()
        self._storage, self._path = storage, path
        self._size, self._place = storage.size(path), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._place = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence])
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        size = min(len(buffer), self._size - self._place)
        if size <= 0:
            return 0
        buffer[:size] = self._storage.read(self._path, self._place, size)
        self._place += size
        return size

    def readall(self) -> bytes:
        """The rest in one range; io's own would ask for 8 KiB at a time."""
        rest = self._storage.read(self._path, self._place, max(0, self._size - self._place))
        self._place += len(rest)
        return rest


def _pread(file: int, offset: int, size: int) -> bytes | None:
    """Bytes of a file, or None when it is too short. One call may return fewer than asked for."""
    data = os.pread(file, size, offset)
    while len(data) < size:
        more = os.pread(file, size - len(data), offset + len(data))
        if not more:
            return None
        data += more
    return data


def _write_local(path: str, data: bytes) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"  # other hosts may have our process id
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def _scheme(path: str) -> str:
    return path.split("://", 1)[0]


def _make_system(scheme: str, path: str) -> Any:
    try:
        import fsspec  # type: ignore[import-untyped]

        # Its own instance, since cached ones are shared across forks; no cache of listings, since files change.
        options = S3_OPTIONS if scheme in ("s3", "s3a") else {}
        system = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError as error:
        raise DataError(f"{path}: {error}; pip install megatron_atum[data]") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}; use a local path or s3://") from error
    system.retries = 1  # s3fs's own
    return system


def _is_transient(error: Exception) -> bool:
    if isinstance(error, DataError) or _is_missing(error) or _is_forbidden(error) or _is_about_settings(error):
        return False
    status = getattr(error, "status", None)
    if isinstance(status, int):  # aiohttp
        return status >= 500 or status in TRANSIENT_STATUS
    if type(error).__module__.split(".")[0] in NETWORK_PACKAGES:
        return True
    if not isinstance(error, OSError):
        return False
    return error.errno is None or error.errno < 0 or error.errno in TRANSIENT  # < 0: name resolution


def _is_missing(error: Exception) -> bool:
    gone = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, gone) or _answer(error)[0] in GONE_STATUS


def _is_forbidden(error: Exception) -> bool:
    status, code = _answer(error)
    return isinstance(error, PermissionError) or status in REFUSED_STATUS or code in REFUSED_CODES


def _is_about_settings(error: Exception) -> bool:
    """Whether botocore did not even ask: no credentials, no such profile, a bucket's name that cannot be one."""
    if isinstance(error, ValueError) and str(error).startswith("Invalid endpoint"):
        return True
    names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "botocore.exceptions"}
    return "BotoCoreError" in names and not names & PASSING_ERRORS


def _answer(error: Exception) -> tuple[int | None, str]:
    """HTTP status and S3's code of a server's answer, as far as the error tells."""
    for found in (error, error.__cause__):
        response = getattr(found, "response", None)
        if isinstance(response, dict):  # botocore's error, which is the cause of s3fs's
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(response.get("Error", {}).get("Code", ""))
    return getattr(error, "status", None), ""


def _permanent(path: str, verb: str, error: Exception) -> DataError | None:
    """What to raise for an error that stays; None: the error itself, which says enough or is a bug of ours."""
    if isinstance(error, DataError):
        return None
    if _is_about_settings(error):
        return DataError(f"{path} cannot be {verb} ({_text(error)}); {_setting(error)}")
    if _is_forbidden(error):
        kind = ForbiddenFile if verb == "read" else DataError
        return kind(f"{path} may not be {verb}, access was refused ({_text(error)}); {_permission(path)}")
    if verb == "read" and _is_missing(error):
        if isinstance(error, IsADirectoryError):
            return MissingFile(f"{path} is a folder, not a file; correct its path")
        return MissingFile(f"{path} does not exist; restore it or correct its path")
    return DataError(f"{path} cannot be {verb} ({_text(error)})") if isinstance(error, OSError) else None


def _permission(path: str) -> str:
    """What to do where access was refused."""
    if not is_remote(path):
        return "correct its permissions"
    advice = "check the credentials, whether they have expired, and their permissions"
    if _scheme(path) not in ("s3", "s3a"):
        return advice
    return f"{advice} (S3 refuses missing files too, where the permission s3:ListBucket is lacking)"


def _setting(error: Exception) -> str:
    """What to set where botocore did not ask."""
    name = type(error).__name__
    if isinstance(error, ValueError):
        return "correct AWS_ENDPOINT_URL, such as https://HOST:PORT"
    if name == "ParamValidationError":
        return "correct the path, s3://BUCKET/KEY"
    if "Profile" in name or "Config" in name:
        return "correct AWS_PROFILE, ~/.aws/config and ~/.aws/credentials"
    if "Region" in name or "Endpoint" in name:
        return "set AWS_DEFAULT_REGION, and AWS_ENDPOINT_URL where the store is not Amazon's"
    return (
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to a complete entry of ~/.aws/credentials, "
        "on all hosts"
    )


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
