"""Rules of the house that no linter knows, for every file of megatron_atum/ (the rooms, and which may import which).

Each rule is a function from a source text to a list of complaints; each has a test that it can fail.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "megatron_atum"
ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
MAX_LINES = 550

# A room imports rooms of lower floors. The ground floor may also import itself, as long as there is no circle.
FLOORS = [
    {"batch", "flops", "errors", "config", "parallel"},
    {"model", "data"},
    {"checkpoint"},
    {"training", "generation", "launch"},
    {"planning"},
    {"evaluation"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: str) -> str:
    """megatron_atum/model/norm.py -> model; megatron_atum/batch.py -> batch; megatron_atum/__init__.py -> ''."""
    parts = Path(path).with_suffix("").parts[1:]
    return "" if parts[0] == "__init__" else parts[0]


def imported_names(path: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that is imported anywhere in the file; relative imports made absolute."""
    package = list(Path(path).parts[:-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def imported_rooms(path: str, source: str) -> Iterator[tuple[int, str]]:
    for line, name in imported_names(path, source):
        parts = name.split(".")
        if parts[0] == PACKAGE and len(parts) > 1 and not parts[1].startswith("__"):
            yield line, parts[1]


# (a) one room touches the device and the process groups -------------------------------------------------------------


def device_complaints(path: str, source: str) -> list[str]:
    """`cuda` and megatron.core.parallel_state belong to parallel/: the CPU layer there would hide a stray one."""
    if room_of(path) == "parallel":
        return []
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    found = []
    for line, name in imported_names(path, source):
        parts = name.split(".")
        if parts[0] == "torch" and "cuda" in parts:
            found.append((line, f"imports {name}"))
        if (parts[0] == "megatron" and parts[-1] in ("parallel_state", "mpu")) or "parallel_state" in parts[:-1]:
            found.append((line, f"imports {name}"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("cuda", "parallel_state", "mpu"):
            found.append((node.lineno, f"uses .{node.attr}"))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            found += [(node.lineno, f"has the string {node.value!r}")] if re.search(r"\bcuda\b", node.value) else []
    return [f"{path}:{line}: {what}, which only {PACKAGE}/parallel/ may" for line, what in sorted(found)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_parallel_touches_devices_and_process_groups(file: Path) -> None:
    assert device_complaints(str(file.relative_to(ROOT)), file.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.cuda.synchronize()",
        "def f(x):\n    return x.cuda()",
        "device = 'cuda'",
        "device = f'cuda:{rank}'",
        "def f(device='cuda:0'): ...",
        "from torch import cuda",
        "import torch.cuda.amp",
        "from megatron.core import parallel_state",
        "from megatron.core import mpu",
        "import megatron.core.parallel_state as ps",
        "from megatron.core.parallel_state import get_tensor_model_parallel_rank",
        "def f():\n    from megatron.core import parallel_state",
        "import megatron.core\nmegatron.core.parallel_state.destroy_model_parallel()",
    ],
)
def test_the_device_rule_can_fail(source: str) -> None:
    assert len(device_complaints("megatron_atum/model/x.py", source)) >= 1
    assert device_complaints("megatron_atum/parallel/x.py", source) == []


@pytest.mark.parametrize(
    "source",
    [
        '"""Runs on cuda."""',
        'def f():\n    """Moves to cuda."""',
        "x = 1  # torch.cuda is elsewhere",
        "name = 'CUDA_DEVICE_MAX_CONNECTIONS'",
        "from megatron_atum.parallel.device import device",
    ],
)
def test_the_device_rule_spares_prose(source: str) -> None:
    assert device_complaints("megatron_atum/model/x.py", source) == []


# (b) imports point down only ----------------------------------------------------------------------------------------


def import_complaints(path: str, source: str) -> list[str]:
    room = room_of(path)
    if not room:
        return [f"{path}:{line}: {PACKAGE}/__init__.py imports {other}" for line, other in imported_rooms(path, source)]
    if room not in FLOOR_OF:
        return [f"{path}: {room} is no room of {PACKAGE}; the rooms are in FLOORS of {Path(__file__).name}"]
    complaints = []
    for line, other in imported_rooms(path, source):
        if other == room:
            continue
        if other not in FLOOR_OF:
            complaints.append(f"{path}:{line}: imports {PACKAGE}.{other}, which is no room")
        elif FLOOR_OF[other] >= FLOOR_OF[room] > 0 or FLOOR_OF[other] > FLOOR_OF[room]:
            complaints.append(f"{path}:{line}: {room} may not import {other}: imports point down only")
    return complaints


def import_circle(sources: dict[str, str]) -> list[str]:
    """The rooms of a circle of imports, [] if there is none."""
    graph: dict[str, set[str]] = {}
    for path, source in sources.items():
        room = room_of(path)
        graph.setdefault(room, set()).update(other for _, other in imported_rooms(path, source) if other != room)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file: Path) -> None:
    assert import_complaints(str(file.relative_to(ROOT)), file.read_text()) == []


def test_rooms_import_in_no_circle() -> None:
    assert import_circle({str(file.relative_to(ROOT)): file.read_text() for file in FILES}) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megatron_atum/batch.py", "from megatron_atum.model import norm"),
        ("megatron_atum/config/schema.py", "import megatron_atum.training.trainer"),
        ("megatron_atum/model/stage.py", "from megatron_atum.data.batch import collate"),
        ("megatron_atum/data/loader.py", "from megatron_atum import model"),
        ("megatron_atum/data/loader.py", "def f():\n    from ..model.norm import RMSNorm"),
        ("megatron_atum/data/converters/wds.py", "from ...checkpoint import save"),
        ("megatron_atum/checkpoint/save.py", "from megatron_atum.training import trainer"),
        ("megatron_atum/training/trainer.py", "from megatron_atum.planning import cost"),
        ("megatron_atum/generation/forward.py", "from megatron_atum.evaluation import shots"),
        ("megatron_atum/model/stage.py", "from megatron_atum.utils import helper"),
        ("megatron_atum/utils.py", ""),
        ("megatron_atum/__init__.py", "from megatron_atum.model import norm"),
    ],
)
def test_the_import_rule_can_fail(path: str, source: str) -> None:
    assert len(import_complaints(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megatron_atum/config/validate.py", "from megatron_atum.errors import ConfigError"),
        (
            "megatron_atum/model/stage.py",
            "from megatron_atum.batch import Batch\nfrom . import norm\nfrom .norm import x",
        ),
        ("megatron_atum/model/__main__.py", "from megatron_atum.parallel.layout import ParallelLayout"),
        ("megatron_atum/evaluation/tasks.py", "from megatron_atum.generation import forward"),
        ("megatron_atum/training/trainer.py", "from megatron_atum import __version__"),
    ],
)
def test_the_import_rule_allows_what_points_down(path: str, source: str) -> None:
    assert import_complaints(path, source) == []


def test_the_circle_rule_can_fail() -> None:
    one_way = {"megatron_atum/config/a.py": "from megatron_atum.parallel import b", "megatron_atum/parallel/b.py": ""}
    assert import_circle(one_way) == []
    both_ways = {**one_way, "megatron_atum/parallel/c.py": "from megatron_atum.config import a"}
    assert set(import_circle(both_ways)) == {"config", "parallel"}


# (c) no file that nobody reads to its end ----------------------------------------------------------------------------


def length_complaints(path: str, source: str) -> list[str]:
    lines = len(source.splitlines())
    return [f"{path} has {lines} lines, more than {MAX_LINES}: split it"] if lines > MAX_LINES else []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_are_short(file: Path) -> None:
    assert length_complaints(str(file.relative_to(ROOT)), file.read_text()) == []


def test_the_length_rule_can_fail() -> None:
    assert length_complaints("megatron_atum/x.py", "\n" * MAX_LINES) == []
    assert len(length_complaints("megatron_atum/x.py", "\n" * (MAX_LINES + 1))) == 1
