"""Checkpoints that are not what was written: passed over with a reason, refused when asked for by name.

Sizes are compared when a checkpoint is looked for, checksums before a run goes on from it. Nothing in a JSON file is
trusted.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_atum.checkpoint.folder import (
    COMPLETE,
    STATE,
    damaged,
    folders_of,
    frozen_of,
    newest_complete,
    read_record,
    record_of,
    step_folder,
    write_record,
)
from megatron_atum.checkpoint.stored import StoredCheckpoint, find_checkpoint, read_state
from megatron_atum.config.loader import load_config
from megatron_atum.errors import AtumError, CheckpointError
from megatron_atum.training.start import confirm_start, prepare_start
from tests.distributed import run_distributed
from tests.faults.runs import SMALL, checkpoints_of, data_overrides, events_of, metrics_of, run

OLDER, NEWER = 2, 4
FLIPS = 16
STATE_FLIPS = 60
MUTATIONS = 120


def overrides(data: Path, *more: str) -> list[str]:
    return [*SMALL, *data_overrides(data), "training.steps=4", "checkpoint.save_every=2", *more]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """logging.root of a finished run that kept steps 2 and 4."""
    root = tmp_path_factory.mktemp("written")
    assert run(root, overrides(data), 2).codes == [0, 0]
    return root


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def newer(root: Path) -> Path:
    return step_folder(checkpoints_of(root), NEWER)


def older(root: Path) -> Path:
    return step_folder(checkpoints_of(root), OLDER)


def flip(path: Path, place: int) -> None:
    """Another value for one byte; the size stays."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def own_frozen(folder: Path) -> Path:
    """Give a step frozen weights that no other step shares."""
    frozen = frozen_of(folder)
    assert frozen is not None
    mine = Path(shutil.copytree(frozen, frozen.with_name("frozen-" + "0" * 16)))
    edit(folder / STATE, "frozen", mine.name)
    return mine


def edit(path: Path, key: str, value: Any) -> None:
    """Change a JSON file of a folder, and its completion record with it."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    record_again(path.parent)


def record_again(folder: Path) -> None:
    """Let the completion record say what is there."""
    names = [record.name for record in read_record(folder)]
    write_record(folder, [record_of(folder / name, name) for name in names])


# What is seen without reading the files ------------------------------------------------------------------------------


def cut(path: Path, count: int = 1) -> None:
    os.truncate(path, path.stat().st_size - count)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def name_outside(folder: Path) -> None:
    content = json.loads((folder / COMPLETE).read_text())
    content["files"]["../outside"] = [0, "0" * 32]
    (folder / COMPLETE).write_text(json.dumps(content))
    (folder.parent / "outside").touch()


def only_record(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != COMPLETE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is missing": (
        lambda f: (f / "weights-00000-0.safetensors").unlink(),
        "weights-00000-0.safetensors is missing",
    ),
    "the optimizer is missing": (lambda f: (f / "optimizer-00001-0.safetensors").unlink(), "optimizer-00001-0"),
    "an asset is missing": (lambda f: (f / "assets/tokenizer.model").unlink(), "assets/tokenizer.model is missing"),
    "state.json is missing": (lambda f: (f / STATE).unlink(), "state.json is missing"),
    "a file is short": (lambda f: cut(f / "weights-00001-0.safetensors"), "weights-00001-0.safetensors has"),
    "a file is long": (lambda f: lengthen(f / "index.json"), "index.json has"),
    "no record": (lambda f: (f / COMPLETE).unlink(), "no complete.json: it is not there"),
    "an empty record": (lambda f: (f / COMPLETE).write_text(""), "no readable complete.json"),
    "a cut record": (lambda f: cut(f / COMPLETE, 2), "no readable complete.json"),
    "only the record": (only_record, "is missing"),
    "nothing": (
        lambda f: [path.rename(f.parent / path.name) for path in f.iterdir()],
        "no complete.json: it is not there",
    ),
    "a file, not a folder": (lambda f: (f.rename(f.with_name("away")), f.write_text("x")), "complete.json"),
    "the record names a file outside": (name_outside, "../outside"),
    "no frozen weights": (lambda f: shutil.rmtree(own_frozen(f)), "frozen-0000000000000000: no complete.json"),
    "short frozen weights": (lambda f: cut(next(own_frozen(f).glob("weights-*"))), "frozen-0000000000000000: "),
    "frozen weights without record": (
        lambda f: (own_frozen(f) / COMPLETE).unlink(),
        "frozen-0000000000000000: no comp",
    ),
    "frozen weights outside": (lambda f: edit(f / STATE, "frozen", "../x"), "'../x'"),
    "frozen weights elsewhere": (lambda f: edit(f / STATE, "frozen", "/frozen-0000000000000000"), "no such folder"),
    "frozen weights that are a step": (lambda f: edit(f / STATE, "frozen", older(f.parents[2]).name), "no such folder"),
    "frozen weights that are a number": (lambda f: edit(f / STATE, "frozen", 7), "names 7"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_latest_passes_over(name: str, root: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, reason = DAMAGES[name]
    damage(newer(root))
    said: list[str] = []
    assert newest_complete(checkpoints_of(root), said.append) == older(root)
    assert len(said) == 1 and said[0].startswith(f"passing over {newer(root)}: ") and reason in said[0], said
    start = prepare_start(load_config(None, overrides(data, f"logging.root={root}")), 1, 0)
    assert start.resume is not None and start.resume.step == OLDER
    assert capsys.readouterr().out.splitlines() == said
    with pytest.raises(CheckpointError, match=newer(root).name):  # asked for by name it is refused
        prepare_start(
            load_config(None, overrides(data, f"logging.root={root}", f"checkpoint.load={newer(root)}")), 1, 0
        )


def test_an_index_that_names_a_file_outside(root: Path) -> None:
    for name in ("../outside", "/etc/passwd", "assets/tokenizer.model", ".."):
        edit(newer(root) / "index.json", "files", [name])
        with pytest.raises(CheckpointError, match="is not a file of this folder"):
            StoredCheckpoint(newer(root))


def test_when_nothing_is_whole(root: Path) -> None:
    said: list[str] = []
    for folder in (newer(root), older(root)):
        (folder / COMPLETE).unlink()
    assert newest_complete(checkpoints_of(root), said.append) is None
    assert [line.split(":")[0] for line in said] == [f"passing over {newer(root)}", f"passing over {older(root)}"]
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        find_checkpoint(root / "run")


# A synchroniser that delivers files in any order ---------------------------------------------------------------------


def test_no_proper_subset_of_the_files_counts(root: Path, tmp_path: Path) -> None:
    """All subsets of the files of a step and its frozen weights, each one file away from the one before it."""
    files = [path for folder in folders_of(older(root)) for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 10
    shutil.rmtree(newer(root))
    away = [tmp_path / str(number) for number in range(len(files))]
    there = set(range(len(files)))
    for number in range(1, 1 << len(files)):
        changed = (number & -number).bit_length() - 1  # Gray code
        if changed in there:
            files[changed].rename(away[changed])
        else:
            away[changed].rename(files[changed])
        there ^= {changed}
        assert len(there) < len(files)
        assert newest_complete(checkpoints_of(root)) is None, [files[place].name for place in there]
    for place in set(range(len(files))) - there:
        away[place].rename(files[place])
    assert newest_complete(checkpoints_of(root)) == older(root)


@pytest.mark.parametrize("seed", range(20))
def test_it_counts_from_the_last_byte_on(seed: int, root: Path) -> None:
    """Files come in any order and in pieces; the older checkpoint is the newest until the last byte is there."""
    chance = random.Random(seed)
    own_frozen(newer(root))
    files = [path for folder in folders_of(newer(root)) for path in folder.rglob("*") if path.is_file()]
    contents = {path: path.read_bytes() for path in files}
    for path in files:
        path.unlink()
    chance.shuffle(files)
    for path in files:
        assert newest_complete(checkpoints_of(root)) == older(root)
        path.write_bytes(contents[path][: chance.randrange(len(contents[path]))])
        assert newest_complete(checkpoints_of(root)) == older(root), path.name
        path.write_bytes(contents[path])
    assert newest_complete(checkpoints_of(root)) == newer(root)
    assert damaged(newer(root)) == []


# What only the checksums show ----------------------------------------------------------------------------------------


def starts(rank: int, world_size: int, cases: list[list[str]]) -> list[tuple[int | None, str, str]]:
    """Of each case: the step at which it goes on, the mistake, and what was printed."""
    return [_start(rank, world_size, case) for case in cases]


def _start(rank: int, world_size: int, case: list[str]) -> tuple[int | None, str, str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            start = confirm_start(prepare_start(load_config(None, case), world_size, rank), rank)
        except AtumError as error:
            return None, f"{type(error).__name__}: {error}", printed.getvalue()
    return start.resume.step if start.resume else 0, "", printed.getvalue()


def test_one_flipped_byte_anywhere(written: Path, data: Path, tmp_path: Path) -> None:
    """All ranks fall back to the older step together, and refuse the damaged one by name."""
    chance, cases, flipped = random.Random(0), [], []
    files = [path.relative_to(newer(written)) for path in newer(written).rglob("*") if path.is_file()]
    for number in range(FLIPS):
        root = Path(shutil.copytree(written, tmp_path / str(number)))
        path = newer(root) / sorted(files)[number % len(files)]
        place = chance.randrange(path.stat().st_size)
        flip(path, place)
        flipped.append(f"{path.relative_to(root)} at {place}")
        named = [f"checkpoint.load={newer(root)}"] if number % 4 == 0 else []
        cases.append(overrides(data, f"logging.root={root}", *named))
    ranks = run_distributed(starts, 2, cases)
    for number, what in enumerate(flipped):
        (step, error, printed), other = (rank[number] for rank in ranks)
        if number % 4:
            assert (step, error) == (OLDER, ""), (what, error)
            assert "passing over" in printed and f"step-{NEWER:08d}" in printed, (what, printed)
        else:
            assert step is None and error.startswith("CheckpointError: ") and f"step-{NEWER:08d}" in error, (
                what,
                error,
            )
        assert other == (step, error, ""), what  # only rank 0 says so


def test_one_flipped_byte_of_the_state(root: Path, data: Path) -> None:
    """It is read before the checksums are compared; what it holds must not keep the run from falling back."""
    path, chance = newer(root) / STATE, random.Random(0)
    content, config = path.read_bytes(), load_config(None, overrides(data, f"logging.root={root}"))
    wrong = []
    for _ in range(STATE_FLIPS):
        place = chance.randrange(len(content))
        flip(path, place)
        try:
            start = prepare_start(config, 1, 0)
            assert start.resume is not None and start.resume.folder in (newer(root), older(root))
        except Exception as error:
            wrong.append(f"{place} {content[place - 10 : place + 10]!r}: {type(error).__name__}: {error}")
        path.write_bytes(content)
    assert not wrong, "\n".join(wrong)


def test_a_run_goes_on_from_the_older_step(root: Path, data: Path) -> None:
    before = [line for line in (root / "run/metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    path = newer(root) / "optimizer-00001-0.safetensors"
    flip(path, path.stat().st_size - 1)
    outcome = run(root, overrides(data), 2)
    assert outcome.codes == [0, 0], outcome.logs
    assert f"passing over {newer(root)} is damaged: " in outcome.logs[0]
    assert "step-00000004/optimizer-00001-0.safetensors does not hold what was written (checksum)" in outcome.logs[0]
    assert [event["step"] for event in events_of(root, "resume")] == [OLDER]
    after = [line for line in (root / "run/metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert [json.loads(line)["loss"] for line in after] == [json.loads(line)["loss"] for line in before]
    assert damaged(newer(root)) == []  # written anew


def test_a_run_whose_steps_are_all_damaged_does_not_begin_anew(root: Path, data: Path) -> None:
    """All steps share the frozen weights. What is left of them may be mended, so nothing is written over."""
    (frozen,) = checkpoints_of(root).glob("frozen-*")
    path = next(frozen.glob("weights-*"))
    flip(path, path.stat().st_size - 1)
    before = sorted(checkpoints_of(root).iterdir()), metrics_of(root).read_bytes()
    outcome = run(root, overrides(data), 2)
    assert outcome.codes == [2, 2], outcome.logs
    assert f"passing over {older(root)} is damaged: " in outcome.logs[0]
    assert "none of them can be used" in outcome.logs[0]
    assert (sorted(checkpoints_of(root).iterdir()), metrics_of(root).read_bytes()) == before
    flip(path, path.stat().st_size - 1)  # mended
    assert run(root, overrides(data), 2).codes == [0, 0]
    assert [event["step"] for event in events_of(root, "resume")][-1:] == [NEWER]


# Garbage in the JSON files -------------------------------------------------------------------------------------------

ODD: list[Any] = [None, True, -1, 0, 3, 1.5, float("nan"), 10**30, 2**63, "", "x", "../x", "/etc/passwd", [], {}, [[]]]
ODD += [[-1], ["x"], {"x": 1}, "frozen-" + "0" * 16, "step-00000002", "\0", "\ud800"]


def mutate(text: str, chance: random.Random) -> bytes:
    """A JSON file with one place changed: as text or as a tree."""
    kind = chance.randrange(6)
    place = chance.randrange(len(text))
    if kind == 0:
        return text[:place].encode()
    if kind == 1:
        return text[:place].encode() + bytes(chance.randrange(256) for _ in range(4)) + text[place + 4 :].encode()
    if kind == 2:
        return chance.choice(
            [b"[" * 200_000, b'{"a":' * 100_000, b"", b"null", b"\xff\xfe", b"[]", b'"x"', b"9" * 5000]
        )
    content = json.loads(text)
    parent, key = chance.choice(list(_places(content)))
    if kind == 3:
        del parent[key]
    else:
        parent[key] = chance.choice(ODD)
    return json.dumps(content).encode()


def _places(node: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Every place of a tree; those at the top more often, of which there are few."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    for key in keys:
        for _ in range(max(1, 40 >> (2 * depth))):
            yield node, key
        yield from _places(node[key], depth + 1)


def read_all(checkpoints: Path, folder: Path) -> None:
    """All that reads a checkpoint."""

    def tensors() -> None:
        stored = StoredCheckpoint(folder)
        for name in stored.names():
            stored.read(name)
        stored.close()

    readers = [lambda: newest_complete(checkpoints), lambda: read_state(folder), tensors, lambda: damaged(folder)]
    for reader in readers:
        with contextlib.suppress(CheckpointError):
            reader()


def fuzz(rank: int, world_size: int, root: str, recorded: bool) -> list[str]:
    """What came of mutations of each JSON file other than CheckpointError.

    Args:
        recorded: let the completion records agree with the mutation, so that it is not found by size.
    """
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    checkpoints = checkpoints_of(Path(root))
    folder = step_folder(checkpoints, NEWER)
    targets = [place / name for place in folders_of(folder) for name in (COMPLETE, STATE, "index.json")]
    targets = [path for path in targets if path.exists()]
    read_all(checkpoints, folder)  # whatever is imported late has been
    opened = _watch_opened()
    found = []
    for number in range(MUTATIONS):
        path, chance = targets[number % len(targets)], random.Random(number)
        before = {file: file.read_bytes() for file in (path, path.with_name(COMPLETE))}
        path.write_bytes(mutate(path.read_text(), chance))
        if recorded and path.name != COMPLETE:
            record_again(path.parent)
        opened.clear()
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(10)
        try:
            read_all(checkpoints, folder)
        except BaseException as error:
            found.append(f"{number} {path.name}: {type(error).__name__}: {str(error)[:100]}")
        signal.alarm(0)
        outside = [name for name in opened if not name.startswith(str(checkpoints))]
        found += [f"{number} {path.name}: opened {name}" for name in outside]
        for file, content in before.items():
            file.write_bytes(content)
    return found


def _too_long(*args: object) -> None:
    raise TimeoutError("ten seconds")


def _watch_opened() -> list[str]:
    """Files that this process opens from now on, other than Python's own."""
    opened: list[str] = []
    own = (sys.prefix, sys.base_prefix, "/usr", "/proc", str(Path(__file__).parents[2] / "megatron_atum"))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], (str, bytes)) and not os.fsdecode(args[0]).startswith(own):
            opened.append(os.fsdecode(args[0]))

    sys.addaudithook(hook)
    return opened


@pytest.mark.parametrize("recorded", [False, True], ids=["sizes tell", "records agree"])
def test_garbage_in_a_json_file(recorded: bool, root: Path) -> None:
    (found,) = run_distributed(fuzz, 1, str(root), recorded, timeout=240)
    assert not found, "\n".join(found)


def test_garbage_in_the_state_at_the_start_of_a_run(root: Path, data: Path) -> None:
    """A state.json that agrees with its checksum and makes no sense."""
    path, config = newer(root) / STATE, load_config(None, overrides(data, f"logging.root={root}"))
    before = {file: file.read_bytes() for file in (path, path.with_name(COMPLETE))}
    found = []
    for number in range(60):
        path.write_bytes(mutate(before[path].decode(), random.Random(number)))
        record_again(path.parent)
        try:
            prepare_start(config, 1, 0)
        except AtumError:
            pass
        except Exception as error:
            found.append(f"{number}: {type(error).__name__}: {str(error)[:100]}")
        for file, content in before.items():
            file.write_bytes(content)
    assert not found, "\n".join(found)
