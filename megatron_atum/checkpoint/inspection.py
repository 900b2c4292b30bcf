"""What a checkpoint or a Hugging Face folder holds, and whether it is whole.

Every file is read once, in pieces, for its checksum and for values that are not finite. Nothing of a folder is run or
unpickled, and neither megatron-core nor transformers is imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from tqdm import tqdm

from megatron_atum.checkpoint.folder import (
    COMPLETE,
    STATE,
    frozen_of,
    is_frozen_name,
    missing,
    newest_complete,
    read_record,
    step_folder,
    step_folders,
)
from megatron_atum.checkpoint.hf_config import from_hf
from megatron_atum.checkpoint.hf_folder import IdeficsFolder
from megatron_atum.checkpoint.index import INDEX, Chunk, Index, StoredTensor, read_index
from megatron_atum.checkpoint.stored import read_state
from megatron_atum.checkpoint.table import hf_shapes, weight_table
from megatron_atum.checkpoint.tensor_file import (
    PIECE_BYTES,
    FileRecord,
    TensorFile,
    ahead,
    as_bytes,
    check_finite,
    read_tensor,
    row_slices,
)
from megatron_atum.config.schema import ModelConfig
from megatron_atum.errors import CheckpointError
from megatron_atum.model.__main__ import PARTS, part_of

WEIGHTS, FROZEN, MOMENTS, MAIN, RANDOM = (
    "weights",
    "frozen weights",
    "moments",
    "higher-precision copies",
    "random state",
)
Facts = dict[str, Any]


def inspect_folder(
    path: Path, *, step: int | None = None, quick: bool = False, tensors: bool = False, progress: bool = False
) -> Facts:
    """Everything that can be said of a folder, as JSON would hold it.

    Args:
        path: a run folder, a folder of steps, a step folder, or a model folder in Hugging Face format.
        step: which step of a run; None is the newest complete one.
        quick: look at sizes and headers only.
        tensors: list every tensor too.

    Returns:
        `whole` says whether nothing is missing or damaged, `problems` what is.

    Raises:
        CheckpointError: there is nothing of this kind in the folder.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder")
    if (path / "config.json").exists() and not (path / STATE).exists():
        return _hugging_face(path, quick, tensors, progress)
    folder, in_run = _locate(path, step)
    facts = _checkpoint(folder, quick, tensors, progress) | {"path": str(path)}
    checkpoints = folder.parent
    facts["steps"] = [_step_line(other) for other in step_folders(checkpoints) if in_run or other != folder]
    facts["unfinished"] = sorted(left.name for left in checkpoints.glob("*.tmp")) if facts["steps"] else []
    facts["whole"] = not facts["problems"] and not (in_run and any(line["why"] for line in facts["steps"]))
    return facts


def _locate(path: Path, step: int | None) -> tuple[Path, bool]:
    """The folder of a step, and whether it was looked for among others."""
    if any((path / name).exists() for name in (STATE, COMPLETE, INDEX)) or path in step_folders(path.parent):
        if step is not None:
            raise CheckpointError(f"{path} is one checkpoint; --step is for a run folder or a folder of steps")
        return path, False
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    folders = step_folders(checkpoints)
    if not folders:
        raise CheckpointError(f"{path} holds no checkpoint; give a run folder, a step folder or a Hugging Face folder")
    if step is None:
        return newest_complete(checkpoints) or folders[0], True
    if step_folder(checkpoints, step) not in folders:
        raise CheckpointError(f"{checkpoints} has no step {step}; the newest is {folders[0].name}")
    return step_folder(checkpoints, step), True


def _step_line(folder: Path) -> Facts:
    problems = missing(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    why = f"{problems[0]}{f' and {len(problems) - 1} more' if problems[1:] else ''}" if problems else ""
    return {"folder": folder.name, "bytes": size, "complete": not problems, "why": why}


# A checkpoint of this project -----------------------------------------------------------------------------------------


@dataclass
class _Folder:
    """A folder with an index: a step, or frozen weights. What cannot be read of it is empty, and in `problems`."""

    path: Path
    records: list[FileRecord]
    index: Index
    problems: list[str]


def _checkpoint(folder: Path, quick: bool, tensors: bool, progress: bool) -> Facts:
    problems = missing(folder)
    state, model = _state_of(folder), None
    if not problems and (folder / STATE).exists():
        try:
            model = read_state(folder).model
        except CheckpointError as error:
            problems.append(str(error))
            state = {}
    folders = [_open(place) for place in _folders(folder)]
    index = {key: tensor for place in folders for key, tensor in place.index.items()}
    frozen = {name for place in folders[1:] for name in place.index}
    facts = {
        "folder": str(folder),
        "kind": _kind(folder, state),
        "complete": not problems,
        "checked": "sizes" if quick else "contents",
        **{key: state.get(key) for key in ("step", "layout", "versions", "data", "frozen")},
        **_model_facts(model, state),
        "kinds": _kinds(index, lambda key: _kind_of(key, frozen, model, state)),
        "files": [{"folder": p.path.name, "name": r.name, "bytes": r.size} for p in folders for r in p.records],
    }
    problems += [problem for place in folders for problem in place.problems if problem not in problems]
    problems += _wrong_tensors(index, model, state) if index else []
    with _bar(sum(r.size for place in folders for r in place.records), progress and not quick) as bar:
        problems += [problem for place in folders for problem in _wrong_files(place, quick, bar.update)]
    facts["problems"] = problems
    if tensors:
        facts["tensors"] = [_tensor_facts(key, tensor) for key, tensor in sorted(index.items())]
    return facts


def _bar(total: int, shown: bool) -> Any:
    return tqdm(total=total, desc="checking", unit="B", unit_scale=True, disable=not shown)


def _state_of(folder: Path) -> Facts:
    """What state.json says, whole or not."""
    try:
        content = json.loads((folder / STATE).read_text())
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def _kind(folder: Path, state: Facts) -> str:
    if not state:
        return "frozen weights of other steps" if is_frozen_name(folder.name) else "unknown"
    return "training checkpoint" if state.get("layout") else "weights only"


def _folders(folder: Path) -> list[Path]:
    try:
        frozen = frozen_of(folder)
    except CheckpointError:  # `missing` says so
        frozen = None
    return [folder] if frozen is None else [folder, frozen]


def _open(path: Path) -> _Folder:
    place = _Folder(path, [], {}, [])
    try:
        place.records = read_record(path)
    except CheckpointError:  # `missing` says so
        return place
    try:
        place.index = read_index(path)
    except CheckpointError as error:
        place.problems.append(str(error))
    return place


def _kind_of(key: str, frozen: set[str], model: ModelConfig | None, state: Facts) -> str:
    if key.startswith("random/"):
        return RANDOM
    if key.startswith("optimizer."):
        return MAIN if key.startswith("optimizer.main/") else MOMENTS
    trains = model is None or not state.get("layout") or key in _trained(model, state)
    return WEIGHTS if trains and key not in frozen else FROZEN


def _trained(model: ModelConfig, state: Facts) -> dict[str, int]:
    """Updates so far of every tensor that trains: state.json has the first tensor of each row."""
    steps = state.get("optimizer_steps") or {}
    return {name: steps[row.hf[0]] for row in weight_table(model) if row.hf[0] in steps for name in row.hf}


def _kinds(index: Index, kind_of: Callable[[str], str]) -> Facts:
    kinds: Facts = {}
    for key, tensor in index.items():
        kind = kinds.setdefault(kind_of(key), {"tensors": 0, "values": 0, "bytes": 0, "dtypes": []})
        dtype = _dtype_name(tensor.dtype)
        kind["tensors"] += 1
        kind["values"] += tensor.size // tensor.dtype.itemsize
        kind["bytes"] += tensor.size
        kind["dtypes"] = sorted({*kind["dtypes"], dtype})
    return {kind: kinds[kind] for kind in (WEIGHTS, FROZEN, MOMENTS, MAIN, RANDOM) if kind in kinds}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _model_facts(model: ModelConfig | None, state: Facts) -> Facts:
    if model is None:
        return {"model": None, "parts": {}, "optimizer_steps": None}
    steps = state.get("optimizer_steps") or {}
    parts = {part: {"parameters": 0, "trainable": 0 if steps else None} for part in PARTS}
    for row in weight_table(model):
        part, values = parts[part_of(row.name)], sum(torch.Size(shape).numel() for shape in row.shapes)
        part["parameters"] += values  # type: ignore[operator]
        if row.hf[0] in steps:
            part["trainable"] += values  # type: ignore[operator]
    counts = sorted(set(steps.values()))
    return {"model": asdict(model), "parts": parts, "optimizer_steps": counts or None}


def _tensor_facts(key: str, tensor: StoredTensor) -> Facts:
    chunks = [asdict(chunk) for chunk in tensor.chunks]
    return {"name": key, "dtype": _dtype_name(tensor.dtype), "shape": list(tensor.shape), "chunks": chunks}


# Whether it is whole --------------------------------------------------------------------------------------------------


def _wrong_tensors(index: Index, model: ModelConfig | None, state: Facts) -> list[str]:
    """Tensors that the model or its optimizer needs and the index does not name."""
    if model is None:
        return []
    problems = []
    for name, shape in hf_shapes(model).items():
        if name not in index:
            problems.append(f"{INDEX} does not name {name}")
        elif index[name].shape != shape:
            problems.append(f"{INDEX} has {name} as {index[name].shape}, and the model needs {shape}")
    moments = {"optimizer.exp_avg", "optimizer.exp_avg_sq"}
    updated = [name for name, count in _trained(model, state).items() if count]
    wanted = [f"{moment}/{name}" for moment in sorted(moments) for name in updated]
    return problems + [f"{INDEX} does not name {key}" for key in wanted if key not in index]


@dataclass(frozen=True)
class _Span:
    """Bytes `start` to `stop` of a file: a chunk of the tensor `key`, or, without a key, what lies between chunks."""

    start: int
    stop: int
    key: str = ""
    dtype: torch.dtype = torch.uint8


def _wrong_files(place: _Folder, quick: bool, progress: Callable[[int], object]) -> Iterator[str]:
    """Problems of the files that are there in full; `missing` has named the others."""
    chunks: dict[str, list[tuple[str, torch.dtype, Chunk]]] = {record.name: [] for record in place.records}
    for key, tensor in place.index.items():
        for chunk in tensor.chunks:
            if chunk.file in chunks:
                chunks[chunk.file].append((key, tensor.dtype, chunk))
            else:
                yield f"{place.path.name}/{INDEX}: {key} lies in {chunk.file}, which {COMPLETE} does not name"
    for record in place.records:
        path = place.path / record.name
        if not path.is_file() or path.stat().st_size != record.size:
            continue
        spans, problems = _places(path, chunks[record.name])
        yield from problems
        if not quick:
            yield from _wrong_content(path, record, _with_gaps(spans, record.size), progress)


def _places(path: Path, chunks: list[tuple[str, torch.dtype, Chunk]]) -> tuple[list[_Span], list[str]]:
    """Where the tensors of a file lie. Its own header must say the same as the index."""
    if not chunks:
        return [], []
    try:
        with TensorFile(path) as file:
            held = {entry.start: entry for entry in file.entries.values() if entry.size}
    except CheckpointError as error:
        return [], [str(error)]
    spans, problems = [], []
    for key, dtype, chunk in chunks:
        size = dtype.itemsize * torch.Size(chunk.sizes).numel()
        entry = held.pop(chunk.start, None) if size else None
        if entry is not None and (entry.dtype, entry.shape) == (dtype, chunk.sizes):
            spans.append(_Span(chunk.start, chunk.start + size, key, dtype))
        elif size:
            problems.append(f"{path.name} does not hold {key} where {INDEX} says (byte {chunk.start})")
    return sorted(spans, key=lambda span: span.start), problems


def _with_gaps(spans: Iterable[_Span], size: int) -> Iterator[_Span]:
    """The same spans and all that lies between them. They do not overlap: the header of the file was checked."""
    place = 0
    for span in (*spans, _Span(size, size)):
        if span.start > place:
            yield _Span(place, span.start)
        if span.key:
            yield span
        place = span.stop


def _wrong_content(
    path: Path, record: FileRecord, spans: Iterable[_Span], progress: Callable[[int], object]
) -> list[str]:
    where, total = f"{path.parent.name}/{record.name}", xxhash.xxh3_128()
    wrong: dict[str, str] = {}
    try:
        with _opened(path) as fd:
            for span, piece in ahead(_pieces(fd, path, spans)):
                total.update(as_bytes(piece))
                if span.dtype.is_floating_point and span.key not in wrong:
                    problem = _not_finite(piece.view(span.dtype), f"{where}: {span.key}")
                    wrong |= {span.key: problem} if problem else {}
                progress(piece.numel())
    except CheckpointError as error:
        return [str(error)]
    problems = list(wrong.values())
    if total.hexdigest() != record.checksum:
        problems.insert(0, f"{where} is damaged: it does not hold what was written (checksum)")
    return problems


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    try:
        yield fd
    finally:
        os.close(fd)


def _pieces(fd: int, path: Path, spans: Iterable[_Span]) -> Iterator[tuple[_Span, torch.Tensor]]:
    """The bytes of the spans, a multiple of any dtype's size at a time."""
    for span in spans:
        for start in range(span.start, span.stop, PIECE_BYTES):
            size = min(PIECE_BYTES, span.stop - start)
            yield span, read_tensor(fd, path, start, (size,), torch.uint8)


def _not_finite(values: torch.Tensor, where: str) -> str:
    try:
        check_finite(values, lambda: where)
    except CheckpointError as error:
        return str(error)
    return ""


# A Hugging Face folder ------------------------------------------------------------------------------------------------


def _hugging_face(path: Path, quick: bool, tensors: bool, progress: bool) -> Facts:
    """Such a folder has no checksums: what can be known is that its tensors are those of its model, and finite."""
    found = sorted(file for file in path.iterdir() if file.is_file())
    files = [{"folder": path.name, "name": file.name, "bytes": file.stat().st_size} for file in found]
    facts: Facts = {"path": str(path), "folder": str(path), "kind": "Hugging Face folder", "files": files, "steps": []}
    facts |= {"checked": "headers" if quick else "contents", "kinds": {}, "problems": [], "notes": []}
    facts |= _model_facts(None, {})
    try:
        _hf_facts(path, facts, quick, tensors, progress)
    except CheckpointError as error:
        facts["problems"].append(str(error))
    return facts | {"complete": not facts["problems"], "whole": not facts["problems"]}


def _hf_facts(path: Path, facts: Facts, quick: bool, tensors: bool, progress: bool) -> None:
    if not _is_safetensors(path):
        facts |= _model_facts(_hf_model(path), {})
        facts["notes"].append(
            "the weights are not in safetensors files and were not opened, since that means unpickling them; "
            "hf_to_atum.py reads .bin files with torch's restricted loader"
        )
        return
    with IdeficsFolder(path) as folder:
        facts |= _model_facts(folder.model, {})
        index = {name: StoredTensor(folder.dtype(name), folder.shape(name), ()) for name in sorted(folder.names())}
        facts["kinds"] = _kinds(index, lambda key: WEIGHTS)
        if folder.dropped:
            facts["notes"].append(f"{len(folder.dropped)} old keys that nothing reads, such as {folder.dropped[0]}")
        if tensors:
            facts["tensors"] = [_tensor_facts(key, tensor) for key, tensor in index.items()]
        with _bar(sum(tensor.size for tensor in index.values()), progress and not quick) as bar:
            facts["problems"] += [] if quick else _hf_not_finite(folder, bar.update)


def _is_safetensors(path: Path) -> bool:
    """Whether all weights lie in safetensors files, so that nothing needs to be unpickled."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists() or not index.exists():
        return (path / "model.safetensors").exists()
    try:
        named = json.loads(index.read_text())["weight_map"].values()
        return all(str(name).endswith(".safetensors") for name in named)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be used: {error!r}") from None


def _hf_model(path: Path) -> ModelConfig:
    file = path / "config.json"
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    return from_hf(content if isinstance(content, dict) else {}, str(file))


def _hf_not_finite(folder: IdeficsFolder, progress: Callable[[int], object]) -> list[str]:
    problems = []
    for name in sorted(folder.names()):
        try:
            for rows in row_slices(folder.shape(name), folder.dtype(name).itemsize):
                progress(folder.read(name, rows).nbytes)
        except CheckpointError as error:
            problems.append(str(error))
    return problems
