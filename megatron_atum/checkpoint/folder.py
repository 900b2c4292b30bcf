"""Folders of checkpoints: their names, what makes one complete, which are kept.

CHECKPOINTS/
    step-00000250/        one step
    frozen-1f6c.../       weights that do not train, written once, shared by the steps that name it in state.json

Each folder has a completion record, complete.json: every other file with its size and checksum. It is written last,
and a storage synchroniser may deliver files in any order, so a folder counts only when all files in its record are
there in full. A folder that is still being written, or that a crash left behind, ends in .tmp.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from megatron_atum.checkpoint.files import write_json
from megatron_atum.checkpoint.index import FORMAT
from megatron_atum.checkpoint.tensor_file import FileRecord, checksum_of
from megatron_atum.errors import CheckpointError, listed

COMPLETE, STATE, ASSETS = "complete.json", "state.json", "assets"
_STEP, _FROZEN = re.compile(r"step-\d{8}"), re.compile(r"frozen-[0-9a-f]{16}")
_FILE = re.compile(rf"({ASSETS}/)?[A-Za-z0-9_][A-Za-z0-9_.-]*")

Report = Callable[[str], None]


def silent(line: str) -> None:
    pass


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def step_folders(checkpoints: Path) -> list[Path]:
    """Folders of steps, complete or not, newest first."""
    if not checkpoints.is_dir():
        return []
    return sorted((path for path in checkpoints.iterdir() if _STEP.fullmatch(path.name)), reverse=True)


def is_frozen_name(name: Any) -> bool:
    return isinstance(name, str) and _FROZEN.fullmatch(name) is not None


# Completeness --------------------------------------------------------------------------------------------------------


def write_record(folder: Path, records: Iterable[FileRecord]) -> None:
    """Write the completion record. Everything else must be on disk."""
    files = {record.name: [record.size, record.checksum] for record in sorted(records, key=lambda r: r.name)}
    write_json(folder / COMPLETE, {"format": FORMAT, "checksum": "xxh3_128", "files": files})


def record_of(file: Path, name: str | None = None) -> FileRecord:
    """The record of a small file that is on disk."""
    return FileRecord(name or file.name, file.stat().st_size, checksum_of(file))


def read_record(folder: Path) -> list[FileRecord]:
    """Raises CheckpointError: there is no record, or it cannot be one."""
    path = folder / COMPLETE
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, and this version reads {FORMAT}")
        return [_file_record(name, *values) for name, values in content["files"].items()]
    except FileNotFoundError:
        reason = "it is not there" if folder.is_dir() else "there is no such folder"
        raise CheckpointError(f"no {COMPLETE}: {reason}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"no readable {COMPLETE}: {error}") from None


def _file_record(name: str, size: Any, checksum: Any) -> FileRecord:
    if not _FILE.fullmatch(name) or type(size) is not int or not isinstance(checksum, str):
        raise ValueError(f"it names {name!r}, which is not a file of this folder")
    return FileRecord(name, size, checksum)


def missing(folder: Path) -> list[str]:
    """What keeps a folder, and the frozen weights it names, from being complete; empty if they are.

    Looks at sizes only; `damaged` reads the files.
    """
    try:
        problems = [problem for record in read_record(folder) if (problem := _size_problem(folder, record))]
        frozen = None if problems else frozen_of(folder)
    except CheckpointError as error:
        return [str(error)]
    if frozen is not None:
        problems = [f"{frozen.name}: {problem}" for problem in missing(frozen)]
    return problems


def _size_problem(folder: Path, record: FileRecord) -> str:
    try:
        size = (folder / record.name).stat().st_size
    except OSError:
        return f"{record.name} is missing"
    if size != record.size:
        return f"{record.name} has {size} bytes, not {record.size}"
    if record.name == STATE and checksum_of(folder / STATE) != record.checksum:  # read before all files are checked
        return f"{STATE} does not hold what was written (checksum)"
    return ""


def frozen_of(folder: Path) -> Path | None:
    """The folder of frozen weights that a step names. Raises CheckpointError."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        name = json.loads(path.read_text())["frozen"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from None
    if name is None:
        return None
    if not is_frozen_name(name):
        raise CheckpointError(f"{path} names {name!r} as its frozen weights, which is no such folder")
    return folder.parent / name


def folders_of(folder: Path) -> list[Path]:
    """A step's folder and that of its frozen weights."""
    frozen = frozen_of(folder)
    return [folder] if frozen is None else [folder, frozen]


def damaged(
    folder: Path, part: int = 0, parts: int = 1, progress: Callable[[int], object] = lambda count: None
) -> list[str]:
    """Files whose content is not what was written, of a complete step and its frozen weights.

    Args:
        part, parts: check only this share of the files; large files are dealt out evenly.
        progress: called with the size of each file that was checked.

    Raises:
        CheckpointError: a record cannot be read.
    """
    files = [(place, record) for place in folders_of(folder) for record in read_record(place)]
    files.sort(key=lambda file: (-file[1].size, file[1].name))
    problems = []
    for place, record in files[part::parts]:
        try:
            if checksum_of(place / record.name) != record.checksum:
                problems.append(f"{place.name}/{record.name} does not hold what was written (checksum)")
        except CheckpointError as error:
            problems.append(str(error))
        progress(record.size)
    return problems


def newest_complete(checkpoints: Path, report: Report = silent, without: Collection[Path] = ()) -> Path | None:
    """The complete checkpoint with the highest step. Those passed over are reported with the reason."""
    for folder in step_folders(checkpoints):
        if folder in without:
            continue
        problems = missing(folder)
        if not problems:
            return folder
        report(f"passing over {folder}: {listed(problems, 3, '; ')}")
    return None


# Removing what is old ------------------------------------------------------------------------------------------------


def remove_unfinished(checkpoints: Path) -> None:
    """Remove what a crash left half written, or half removed."""
    remove(checkpoints.glob("*.tmp") if checkpoints.is_dir() else ())


def remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def retire_old(checkpoints: Path, newest: Path, keep: int, keep_every: int) -> list[Path]:
    """Take old complete checkpoints, and frozen weights that no step names any more, out of the way.

    Args:
        newest: the checkpoint that was just completed; later ones, left by a run that was rolled back, stay.
        keep: how many complete ones to keep, `newest` included; 0 keeps all.
        keep_every: those whose step is a multiple of it stay for ever; 0 keeps none beside the newest.

    Returns:
        Folders that do not count any more, to be removed; freeing large files takes its time.
    """
    older = [folder for folder in step_folders(checkpoints) if folder.name <= newest.name and not missing(folder)]
    retired = []
    for folder in older[keep:] if keep else []:
        step = int(folder.name.removeprefix("step-"))
        if not (keep_every and step % keep_every == 0):
            retired += _retire(folder)
    return retired + [path for folder in _unused_frozen(checkpoints) for path in _retire(folder)]


def _retire(folder: Path) -> list[Path]:
    retired = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.old.tmp")
    try:
        folder.rename(retired)
    except OSError as error:
        print(f"{folder} could not be removed: {error}", file=sys.stderr, flush=True)
        return []
    return [retired]


def _unused_frozen(checkpoints: Path) -> list[Path]:
    used = set()
    for folder in step_folders(checkpoints):
        try:
            if not (folder / STATE).exists():
                raise CheckpointError(f"{folder} has no {STATE}")
            used.add(frozen_of(folder))
        except CheckpointError:
            return []  # a step that cannot be asked may need any of them
    return [path for path in checkpoints.iterdir() if is_frozen_name(path.name) and path not in used]
