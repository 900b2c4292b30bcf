"""The driver of all converters: parts to shards, so that a restart goes on where it was.

A part is one input file. Its shards are `OUT/PART-NNNNN.tar`; `OUT/PART.counts.json` is written when they are all
there, and a part without it is made anew. `OUT/conversion.json` holds the settings and, at the end, the totals.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import threading
import time
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm import tqdm

from megatron_atum.data.converters.counts import IN_DROPPED_SAMPLE, Counts
from megatron_atum.data.converters.drafts import Draft, Dropped, ImageSource, Lost, Source, found_bytes
from megatron_atum.data.converters.fetch import Fetcher, FetchSpec, make_fetcher
from megatron_atum.data.converters.parts import Part, find_parts
from megatron_atum.data.converters.reach import Reach
from megatron_atum.data.converters.reencode import ImageLimits, ImageProblem, reencode
from megatron_atum.data.converters.workers import Failed, Message, Progress, Report, run_parts
from megatron_atum.data.shards import ConversationRecord, PairRecord, Record, write_shard
from megatron_atum.errors import DataError

VERSION = 2
SUMMARY = "conversion.json"
AHEAD = 16  # images on their way per thread: one slow server must not hold up the others
REPORT_S = 1.0


@dataclass(frozen=True)
class Conversion:
    """Everything a worker has to know. Only what `options` returns changes the result."""

    source: Source
    out: str
    limits: ImageLimits = field(default_factory=ImageLimits)
    fetch: FetchSpec = field(default_factory=FetchSpec)
    samples_per_shard: int = 10_000
    shard_bytes: int = 2**30
    threads: int = 32  # that fetch
    decoders: int = 2  # images decoded at a time: those are large
    max_unreachable: float = 0.5  # of a part's URLs; a part with more is not finished

    def options(self) -> dict[str, Any]:
        """By their names on the command line."""
        limits = {name.replace("_", "-"): value for name, value in asdict(self.limits).items()}
        shards = {"samples-per-shard": self.samples_per_shard, "shard-bytes": self.shard_bytes}
        return {**self.source.options(), "fetcher": self.fetch.kind, **limits, **shards}

    def counts_path(self, part: Part) -> str:
        return os.path.join(self.out, f"{part.name}.counts.json")


def convert(conversion: Conversion, inputs: Sequence[str], workers: int = 1, quiet: bool = False) -> Counts:
    """Converts what is not converted yet, and returns the counts of all there is in the folder.

    Args:
        inputs: files, folders and globs.
        workers: processes; 0 works in this one.
        quiet: without a progress bar.

    Raises:
        DataError: no input, a folder of another conversion, parts that cannot be read (after all others are done).
    """
    make_fetcher(conversion.fetch)  # now, and not when the first worker gets to it
    parts = find_parts(inputs, conversion.source.suffixes, conversion.out)
    with _locked(conversion.out):
        _check_summary(conversion)
        skipped = {part.name: why for part in parts if (why := conversion.source.unfinished(part))}
        if len(skipped) == len(parts):
            raise DataError(
                f"nothing to convert: {parts[0].path}: {skipped[parts[0].name]} (--incomplete use takes it)"
            )
        waiting = [part for part in parts if part.name not in skipped and not _is_done(conversion, part)]
        failed = _run(conversion, waiting, workers, quiet)
        counts = _summarise(conversion, len(parts), skipped, failed)
    if failed:
        some = "; ".join(list(failed.values())[:10])
        raise DataError(
            f"{len(failed)} of {len(parts)} parts could not be converted; mend or remove them and start again: {some}"
        )
    return counts


def _run(conversion: Conversion, parts: Sequence[Part], workers: int, quiet: bool) -> dict[str, str]:
    """The parts that failed, with the reasons."""
    failed: dict[str, str] = {}
    running: dict[str, Counts] = {}
    with tqdm(total=len(parts), unit="part", disable=quiet or not parts) as bar:

        def show(part: Part, message: Message) -> None:
            if isinstance(message, Progress):
                running[part.name] = message.counts
                bar.set_postfix_str(_postfix(running))
                return
            if isinstance(message, Failed):
                failed[part.name] = message.message
            bar.update()

        run_parts(PartConverter(conversion), parts, workers, show)
    return failed


def _postfix(running: dict[str, Counts]) -> str:
    total = Counts()
    for counts in running.values():
        total.add(counts)
    lost = total.images_lost.total()
    return f"{total.kept:,} samples, {total.dropped.total():,} dropped, {total.images_kept:,} images, {lost:,} lost"


class PartConverter:
    """Makes the shards of a part, then its counts. Sent to a worker, it makes its own fetcher there."""

    def __init__(self, conversion: Conversion) -> None:
        self._conversion = conversion
        self._fetcher: Fetcher | None = None

    def __call__(self, part: Part, report: Report) -> None:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # about files that are refused or mended here
        if self._fetcher is None:
            self._fetcher = make_fetcher(self._conversion.fetch)
        _remove_leftovers(self._conversion, part)
        counts, reach, found = Counts(), Reach(), part.fingerprint()
        records = _records(self._conversion, part, self._fetcher, counts, reach, report)
        try:
            shards = list(_write_shards(self._conversion, part, records))
            reach.check(part.path, self._conversion.max_unreachable)
            _check_readable(part, counts)
        except DataError:
            _remove_leftovers(self._conversion, part)  # half a part would look like data
            raise
        finally:
            records.close()
        record = {
            "version": VERSION,
            "input": {"name": os.path.basename(part.path), **found},
            "options": self._conversion.options(),
            "shards": shards,
            **counts.to_json(),
        }
        _write_json(self._conversion.counts_path(part), record)


def _check_readable(part: Part, counts: Counts) -> None:
    """Raises DataError when nothing is kept and nothing could be read: the file has another form than it should."""
    if not counts.kept and counts.dropped and set(counts.dropped) == {"bad_json"}:
        raise DataError(
            f"{part.path}: none of its {counts.dropped.total()} rows can be read as JSON (bad_json); a text file holds "
            "one JSON object a line, or is one JSON list of objects where docs/convert.md says so; correct or remove it"
        )


def _records(
    conversion: Conversion, part: Part, fetcher: Fetcher | None, counts: Counts, reach: Reach, report: Report
) -> Generator[Record, None, None]:
    """Finished samples in the order of the input, while images of later ones are on their way."""
    pool = ThreadPoolExecutor(conversion.threads)
    images = _Images(fetcher, conversion)
    coming: deque[tuple[Draft, list[Future[bytes | Lost]]]] = deque()
    ahead, reported = 0, time.monotonic()
    try:
        for draft in conversion.source.read(part):
            if isinstance(draft, Dropped):
                counts.dropped[draft.reason] += draft.samples
                continue
            futures = [pool.submit(images.obtain, source) for source in draft.sources()]
            coming.append((draft, futures))
            ahead += len(futures) + 1
            while ahead > AHEAD * conversion.threads:
                ahead -= len(coming[0][1]) + 1
                yield from _finished(*coming.popleft(), counts, reach)
            if time.monotonic() > reported + REPORT_S:
                report(counts)
                reported = time.monotonic()
        while coming:
            yield from _finished(*coming.popleft(), counts, reach)
        report(counts)
    finally:
        pool.shutdown(cancel_futures=True)


class _Images:
    """Fetching may be done by many threads at once, decoding by few: a decoded image takes a lot of memory."""

    def __init__(self, fetcher: Fetcher | None, conversion: Conversion) -> None:
        self._fetcher, self._limits = fetcher, conversion.limits
        self._decoding = threading.BoundedSemaphore(conversion.decoders)

    def obtain(self, source: ImageSource) -> bytes | Lost:
        """The image as it is stored, or why there is none."""
        try:
            found = found_bytes(source, self._fetcher, self._limits.max_bytes)
            with self._decoding:
                return reencode(found, self._limits)
        except ImageProblem as problem:
            return Lost(problem.reason)


def _finished(draft: Draft, futures: list[Future[bytes | Lost]], counts: Counts, reach: Reach) -> Iterator[Record]:
    images = [future.result() for future in futures]
    reach.add(draft.sources(), images)
    had = sum(isinstance(image, bytes) for image in images)
    counts.images_lost.update(image.reason for image in images if isinstance(image, Lost))
    record = draft.finish(images)
    if isinstance(record, Dropped):
        counts.dropped[record.reason] += record.samples
        if had:
            counts.images_lost[IN_DROPPED_SAMPLE] += had
        return
    counts.kept += 1
    counts.images_kept += had
    yield record


def _write_shards(conversion: Conversion, part: Part, records: Iterator[Record]) -> Iterator[dict[str, Any]]:
    """Name, samples and bytes of each shard."""
    first = next(records, None)
    number = 0
    while first is not None:
        name = f"{part.name}-{number:05d}.tar"
        shard = _OneShard(conversion, first, records)
        samples = write_shard(os.path.join(conversion.out, name), shard)
        yield {"name": name, "samples": samples, "bytes": os.path.getsize(os.path.join(conversion.out, name))}
        first, number = shard.next, number + 1


class _OneShard:
    """The records of one shard; afterwards `next` is the first of the following shard."""

    def __init__(self, conversion: Conversion, first: Record, others: Iterator[Record]) -> None:
        self._conversion, self._others = conversion, others
        self.next: Record | None = first

    def __iter__(self) -> Iterator[Record]:
        samples = size = 0
        while self.next is not None:
            size += _size(self.next)
            samples += 1
            if samples > 1 and (samples > self._conversion.samples_per_shard or size > self._conversion.shard_bytes):
                return
            yield self.next
            self.next = next(self._others, None)


def _size(record: Record) -> int:
    if isinstance(record, PairRecord):
        return len(record.image) + len(record.text)
    if isinstance(record, ConversationRecord):
        return sum(len(item) for _, content in record.turns for item in content)
    return sum(len(image) for image in record.images if image) + sum(len(text) for text in record.texts if text)


def _is_done(conversion: Conversion, part: Part) -> bool:
    """Whether a part is converted and its shards are there. Raises DataError when it was made of something else."""
    path = conversion.counts_path(part)
    record = _read_json(path)
    if record is None:
        return False
    _check_options(path, record, conversion)
    changed = [name for name, value in part.fingerprint().items() if record["input"].get(name) != value]
    if changed:
        raise DataError(
            f"{part.path} changed ({', '.join(changed)}) since {path} was made of it; restore it, or remove that file "
            "to convert it anew"
        )
    shards = [(os.path.join(conversion.out, shard["name"]), shard["bytes"]) for shard in record["shards"]]
    return all(os.path.isfile(shard) and os.path.getsize(shard) == size for shard, size in shards)


def _remove_leftovers(conversion: Conversion, part: Part) -> None:
    mine = re.compile(re.escape(part.name) + r"(-\d{5,}\.tar|\.counts\.json)(\.\d+\.tmp)?")
    # The counts first: without them the part counts as unfinished, whatever happens in between.
    for name in sorted(os.listdir(conversion.out), key=lambda name: ".counts.json" not in name):
        if mine.fullmatch(name):
            os.remove(os.path.join(conversion.out, name))


def _check_summary(conversion: Conversion) -> None:
    """Refuses a folder of something else, and claims an empty one."""
    path = os.path.join(conversion.out, SUMMARY)
    summary = _read_json(path)
    if summary is not None:
        _check_options(path, summary, conversion)
        return
    others = [name for name in os.listdir(conversion.out) if not name.startswith(SUMMARY)]
    if others:
        raise DataError(f"{conversion.out} is not empty ({sorted(others)[0]}) and no conversion; choose another --out")
    _write_json(path, {"version": VERSION, "complete": False, "options": conversion.options()})


def _check_options(path: str, record: dict[str, Any], conversion: Conversion) -> None:
    if record.get("version") != VERSION:
        raise DataError(f"{path} was made by another version of the converters; use another --out")
    before, now = record["options"], conversion.options()
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if differing:
        what = ", ".join(f"{name} {before.get(name)!r} (now {now.get(name)!r})" for name in differing)
        raise DataError(f"{path} was made with other settings: {what}; use the same ones or another --out")


def _summarise(conversion: Conversion, parts: int, skipped: dict[str, str], failed: dict[str, str]) -> Counts:
    """Totals of all parts in the folder, those of earlier calls included: written, printed and returned."""
    counts, done = Counts(), 0
    for name in sorted(os.listdir(conversion.out)):
        if name.endswith(".counts.json") and (record := _read_json(os.path.join(conversion.out, name))):
            counts.add(Counts.from_json(record))
            done += 1
    summary = {
        "version": VERSION,
        "complete": not skipped and not failed,
        "options": conversion.options(),
        "parts": done,
        "skipped": skipped,
        "failed": failed,
        **counts.to_json(),
    }
    _write_json(os.path.join(conversion.out, SUMMARY), summary)
    print(f"{conversion.out}: {done} parts converted, {len(skipped)} skipped, {len(failed)} failed")
    for name, why in list(skipped.items())[:10]:
        print(f"  skipped {name}: {why}")
    print(counts.table())
    return counts


@contextlib.contextmanager
def _locked(out: str) -> Iterator[None]:
    """One conversion at a time in a folder. The lock ends with the process, however that ends."""
    if os.path.exists(out) and not os.path.isdir(out):
        raise DataError(f"--out {out} is a file; give a folder")
    os.makedirs(out, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise DataError(f"another conversion is writing to {out}; wait for it or choose another --out") from error
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(folder)


def _read_json(path: str) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as stream:
            value: dict[str, Any] = json.load(stream)
            return value
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); remove it to convert anew") from error


def _write_json(path: str, value: dict[str, Any]) -> None:
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w") as stream:
        json.dump(value, stream, indent=1, ensure_ascii=True)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
