"""tools/checkpoint/inspect.py: what it says of good and bad folders, and that it is light."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_atum.checkpoint import inspection
from megatron_atum.checkpoint.hf_export import write_hf_folder
from megatron_atum.checkpoint.source import Given
from megatron_atum.checkpoint.stored import write_weights
from megatron_atum.checkpoint.table import hf_shapes
from tests.checkpoint.folders import MODEL, NAME, SHAPE, change_tensors, to_bins, weights
from tests.checkpoint.runs import BF16, config_of, engine_of, saved, steps
from tests.distributed import run_distributed
from tests.layouts import Degrees
from tests.tools.calls import Done, call, flip
from tools.checkpoint import inspect

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


def train(rank: int, world_size: int, root: str) -> None:
    engine, checkpoint = engine_of(config_of(BF16, frozen=True), Degrees(tensor=2), Path(root) / "checkpoints", seed=1)
    for step in (1, 2):
        steps(engine, range(step))
        saved(checkpoint, step)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    run_distributed(train, 2, str(root))
    return root


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run that a test may spoil."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    write_weights(tmp_path / "atum", MODEL, Given(weights(MODEL, torch.bfloat16, torch.float32)))
    return tmp_path / "atum"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    write_hf_folder(tmp_path / "hf", MODEL, Given(weights()))
    return tmp_path / "hf"


def as_json(capsys: Capture, *options: str | Path) -> dict[str, Any]:
    return json.loads(call(inspect.main, capsys, *options, "--json").out)


def lines(done: Done, start: str) -> list[str]:
    return [line for line in done.out.splitlines() if line.startswith(start)]


# Good ones ------------------------------------------------------------------------------------------------------------


def test_a_run(run: Path, capsys: Capture) -> None:
    done = call(inspect.main, capsys, run)
    assert done.code == 0 and "100%" in done.err
    assert max(map(len, done.out.splitlines())) <= 100
    step = run / "checkpoints/step-00000002"
    assert f"folder     {step}" in done.out.replace("\n" + " " * 11, "")
    for text in (
        "training checkpoint, step 2",
        "2 ranks: tensor 2",
        "optimizer  3 updates",
        "data       position 17",
        "written by megatron_atum",
        "whole      all contents checked",
        "97 + 2 words",
    ):
        assert text in done.out, text
    assert [line.split()[::3] for line in lines(done, "  step-0000000")[-2:]] == [
        ["step-00000002", "complete"],
        ["step-00000001", "complete"],
    ]


def test_parts_and_kinds_add_up(run: Path, capsys: Capture) -> None:
    facts = as_json(capsys, run)
    kinds, parts = facts["kinds"], facts["parts"]
    trainable = sum(part["trainable"] for part in parts.values())
    assert kinds["weights"]["values"] == trainable == kinds["higher-precision copies"]["values"]
    assert kinds["moments"]["values"] == 2 * trainable
    assert kinds["frozen weights"]["values"] == sum(part["parameters"] for part in parts.values()) - trainable > 0
    assert parts["vision"]["trainable"] == 0 < parts["perceiver"]["trainable"] == parts["perceiver"]["parameters"]
    assert [kinds[kind]["dtypes"] for kind in kinds] == [["bfloat16"]] * 2 + [["float32"]] * 2 + [["uint8"]]
    assert kinds["weights"]["bytes"] == 2 * trainable
    assert sum(file["bytes"] for file in facts["files"]) > sum(kind["bytes"] for kind in kinds.values())
    assert facts["whole"] and facts["layout"]["tensor"] == 2 and facts["optimizer_steps"] == [3]


def test_one_step_and_its_frozen_weights(run: Path, capsys: Capture) -> None:
    checkpoints = run / "checkpoints"
    for options in ((checkpoints / "step-00000001",), (run, "--step", "1"), (checkpoints, "--step", "1")):
        assert as_json(capsys, *options)["step"] == 1
    frozen = next(checkpoints.glob("frozen-*"))
    done = call(inspect.main, capsys, frozen)
    assert done.code == 0 and "is         frozen weights of other steps" in done.out


def test_weights_only(imported: Path, capsys: Capture) -> None:
    facts = as_json(capsys, imported)
    assert facts["kind"] == "weights only" and facts["step"] == 0 and facts["layout"] is None and facts["whole"]
    assert facts["kinds"].keys() == {"weights", "frozen weights"}
    assert facts["kinds"]["weights"]["dtypes"] == ["bfloat16", "float32"]
    assert facts["parts"]["decoder"]["trainable"] is None  # nothing says what will train
    assert call(inspect.main, capsys, imported).code == 0


def test_every_tensor_is_listed(imported: Path, capsys: Capture) -> None:
    done = call(inspect.main, capsys, imported, "--tensors")
    shape = list(SHAPE)
    place = done.out.splitlines().index(f"  {NAME}")
    dtype, box = done.out.splitlines()[place + 1 : place + 3]
    assert dtype.split(maxsplit=1) == ["float32", str(shape)] or dtype.split(maxsplit=1) == ["bfloat16", str(shape)]
    assert box.strip().startswith(f"[0:{shape[0]},0:{shape[1]}] in weights-0.safetensors from byte")
    listed = {tensor["name"]: tensor["shape"] for tensor in as_json(capsys, imported, "--tensors")["tensors"]}
    assert listed == {name: list(shape) for name, shape in hf_shapes(MODEL).items()}


@pytest.mark.parametrize("parts", [1, 3])
def test_hugging_face(parts: int, hf: Path, tmp_path: Path, capsys: Capture) -> None:
    if parts > 1:
        write_hf_folder(tmp_path / "parts", MODEL, Given(weights()), shard_bytes=60_000)
        hf = tmp_path / "parts"
    facts = as_json(capsys, hf)
    assert facts["kind"] == "Hugging Face folder" and facts["whole"] and facts["checked"] == "contents"
    assert facts["kinds"]["weights"]["tensors"] == len(hf_shapes(MODEL))
    assert call(inspect.main, capsys, hf, "--quick").code == 0


# Bad ones -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["step-00000002/optimizer-00001-0.safetensors", "frozen-*/weights-00000-0.safetensors"]
)
def test_a_flipped_byte(file: str, run: Path, capsys: Capture) -> None:
    spoilt = next((run / "checkpoints").glob(file))
    flip(spoilt)
    done = call(inspect.main, capsys, run)
    assert done.code == 1 and lines(done, "NOT WHOLE")
    said = " ".join(" ".join(lines(done, "problem")).split())
    assert f"{spoilt.parent.name}/{spoilt.name} is damaged" in said
    assert call(inspect.main, capsys, run, "--quick").code == 0  # that looks at sizes only, and says so


def test_pieces_smaller_than_a_tensor(run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "PIECE_BYTES", 64)
    assert as_json(capsys, run)["problems"] == []


def test_a_missing_file(run: Path, capsys: Capture) -> None:
    (run / "checkpoints/step-00000002/weights-00001-0.safetensors").unlink()
    done = call(inspect.main, capsys, run / "checkpoints/step-00000002")
    assert done.code == 1 and "INCOMPLETE" in done.out
    assert "weights-00001-0.safetensors is missing" in " ".join(done.out.split())
    done = call(inspect.main, capsys, run)  # the newest complete one is step 1
    assert done.code == 1 and "training checkpoint, step 1" in done.out and "another one is incomplete" in done.out
    assert as_json(capsys, run, "--step", "2")["complete"] is False


@pytest.mark.parametrize("file", ["complete.json", "state.json", "index.json"])
@pytest.mark.parametrize("content", [None, "", "{}", "[1]", '{"format": 2, "files": 3}'])
def test_unreadable_descriptions(file: str, content: str | None, run: Path, capsys: Capture) -> None:
    path = run / "checkpoints/step-00000002" / file
    path.unlink() if content is None else path.write_text(content)
    done = call(inspect.main, capsys, path.parent, "--quick")
    assert done.code == 1 and lines(done, "NOT WHOLE"), done.err


def change_index(folder: Path, change: Any) -> None:
    """Change the index and make its record right, as a program with a mistake would write it."""
    from megatron_atum.checkpoint.folder import read_record, record_of, write_record

    content = json.loads((folder / "index.json").read_text())
    change(content["tensors"])
    (folder / "index.json").write_text(json.dumps(content))
    records = [record for record in read_record(folder) if record.name != "index.json"]
    write_record(folder, [*records, record_of(folder / "index.json")])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors[NAME]["chunks"][0].__setitem__(3, 10**9), "does not hold"),
        (lambda tensors: tensors[NAME]["chunks"][0].__setitem__(3, tensors[NAME]["chunks"][0][3] + 4), "does not hold"),
        (
            lambda tensors: tensors[NAME].update(dtype={"BF16": "F16", "F32": "I32"}[tensors[NAME]["dtype"]]),
            "does not hold",
        ),
        (lambda tensors: tensors.pop(NAME), "does not name"),
    ],
    ids=["beyond the file", "in another place", "as another dtype", "not at all"],
)
def test_an_index_that_is_not_true(change: Any, said: str, imported: Path, capsys: Capture) -> None:
    change_index(next(imported.glob("frozen-*")), change)
    for options in ((), ("--quick",)):
        facts = as_json(capsys, imported, *options)
        assert not facts["whole"] and any(said in problem and NAME in problem for problem in facts["problems"])


def test_missing_moments(run: Path, capsys: Capture) -> None:
    key = "optimizer.exp_avg_sq/model.perceiver_resampler.latents"
    change_index(run / "checkpoints/step-00000002", lambda tensors: tensors.pop(key))
    assert as_json(capsys, run, "--quick")["problems"] == [f"index.json does not name {key}"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float, imported: Path, hf: Path, capsys: Capture) -> None:
    facts = as_json(capsys, imported, "--tensors")
    chunk = next(tensor for tensor in facts["tensors"] if tensor["name"] == NAME)["chunks"][0]
    file = next(imported.glob(f"frozen-*/{chunk['file']}"))
    content, dtype = bytearray(file.read_bytes()), torch.bfloat16 if chunk_is_bf16(facts) else torch.float32
    content[chunk["start"] : chunk["start"] + dtype.itemsize] = (
        torch.tensor([value], dtype=dtype).view(torch.uint8).tolist()
    )
    file.write_bytes(content)
    problems = as_json(capsys, imported)["problems"]
    assert len(problems) == 2 and NAME in problems[1] and "NaN or infinite" in problems[1]  # and the checksum
    change_tensors(hf, {NAME: torch.full(SHAPE, value)})
    problems = as_json(capsys, hf)["problems"]
    assert len(problems) == 1 and NAME in problems[0] and "NaN or infinite" in problems[0]


def chunk_is_bf16(facts: dict[str, Any]) -> bool:
    return next(tensor for tensor in facts["tensors"] if tensor["name"] == NAME)["dtype"] == "bfloat16"


def test_a_hugging_face_folder_without_a_tensor(hf: Path, capsys: Capture) -> None:
    change_tensors(hf, {NAME: None})
    done = call(inspect.main, capsys, hf)
    assert done.code == 1 and NAME in done.out


def test_bin_files_are_not_opened(hf: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it was opened")

    to_bins(hf, 2)
    monkeypatch.setattr(torch, "load", refuse)
    done = call(inspect.main, capsys, hf)
    assert done.code == 0 and "were not opened" in " ".join(done.out.split())
    shutil.move(hf / "pytorch_model.bin.index.json", hf / "model.safetensors.index.json")  # that names .bin files
    assert "were not opened" in " ".join(call(inspect.main, capsys, hf).out.split())


def test_wrong_use(run: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").mkdir()
    for options, said in (
        ((tmp_path / "gone",), "is not a folder"),
        ((tmp_path / "empty",), "holds no checkpoint"),
        ((run, "--step", "7"), "has no step 7"),
        ((run / "checkpoints/step-00000001", "--step", "1"), "--step is for a run folder"),
    ):
        done = call(inspect.main, capsys, *options)
        assert (done.code, done.out) == (2, "") and said in done.err and done.err.count("\n") == 1


# The tools folder -----------------------------------------------------------------------------------------------------


def test_python_keeps_its_own_module_and_nothing_large_is_loaded(imported: Path) -> None:
    """inspect.py lies first on the path of every tool, where Python has a module of this name."""
    code = """
import sys
tool, sys.argv = sys.argv[1], sys.argv[1:]
folder = tool.rpartition("/")[0]
sys.path.insert(0, folder)
for name in ("inspect", "dataclasses"):
    sys.modules.pop(name, None)
try:
    exec(compile(open(tool).read(), tool, "exec"), {"__name__": "__main__", "__doc__": "x", "__file__": tool})
except SystemExit as end:
    assert not end.code
import inspect
assert inspect.signature and not inspect.__file__.startswith(folder) and folder not in sys.path, inspect
assert not {"megatron", "transformers"} & sys.modules.keys()
"""
    for tool, *options in (
        ("inspect.py", imported),
        ("standalone.py", "--checkpoint", imported, "--out", imported / "copied"),
    ):
        command = [sys.executable, "-c", code, ROOT / "tools/checkpoint" / tool, *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr


def test_help_has_examples(capsys: Capture) -> None:
    done = call(inspect.main, capsys, "--help")
    assert done.code == 0 and "python tools/checkpoint/inspect.py runs/tiny" in done.out
