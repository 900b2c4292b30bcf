"""tools/data/index.py, validate.py and stats.py, from the shards to what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.tiny.make_data import make_data
from megatron_atum.data.images import IMAGE_FAULTS
from tests.tools.calls import call, flip
from tools.data import index, stats, validate

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_data(folder, repeat_documents=3)
    return folder


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    """Shards that a test may spoil, each kind in its folder."""
    for kind in ("documents", "pairs"):
        (tmp_path / kind).mkdir()
        for shard in made.glob(f"{kind}-*.tar"):
            (tmp_path / kind / shard.name).write_bytes(shard.read_bytes())
    (tmp_path / "tokenizer.model").write_bytes((made / "tokenizer.model").read_bytes())
    return tmp_path


@pytest.fixture
def indexed(data: Path, capsys: Capture) -> Path:
    for kind in ("documents", "pairs"):
        options = ("--kind", kind, "--tokenizer", data, "--workers", "0", "--quiet")
        assert call(index.main, capsys, data / kind, *options).code == 0
    (data / "run.yaml").write_text(
        f"""
        model: {{preset: tiny}}
        data:
          tokenizer: {data}
          sequence_length: 256
          filters: []
          sources:
            - {{name: web, shards: {data}/documents/manifest.json, kind: documents, weight: 3, max_images: 6}}
            - {{name: captions, shards: {data}/pairs/manifest.json, kind: pairs, weight: 1, max_images: 8}}
        training: {{steps: 100, micro_batch_size: 1, global_batch_size: 4}}
        """
    )
    return data


def test_index_by_path(data: Path, capsys: Capture) -> None:
    """As a user starts it: with a progress bar, worker processes, and from any folder."""
    tool = [sys.executable, str(ROOT / "tools" / "data" / "index.py"), "documents", "--kind", "documents"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = ["--tokenizer", "tokenizer.model", "--workers", "2"]
    made = subprocess.run([*tool, *options], cwd=data, capture_output=True, text=True, env=environment)
    assert made.returncode == 0, made.stderr
    assert "shard" in made.stderr and "100%" in made.stderr
    assert made.stdout.splitlines()[-1] == f"wrote {data}/documents/manifest.json"
    checked = call(validate.main, capsys, data / "documents" / "manifest.json", "--images", "--workers", "1")
    assert (checked.code, checked.out) == (0, "no fault\n")


def test_index_says_what_there_is(data: Path, capsys: Capture) -> None:
    shard = next((data / "documents").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-20_000])
    done = call(index.main, capsys, shard, "--kind", "documents", "--tokenizer", data, "--workers", "0", "--quiet")
    assert done.code == 0 and "1 shards of documents" in done.out and "samples" in done.out
    assert f"damaged: {shard}: cut off" in done.out and "truncated_tar: 1" in done.out


def test_index_refuses_what_it_cannot_use(data: Path, capsys: Capture) -> None:
    options = ("--kind", "pairs", "--tokenizer", data, "--workers", "0", "--quiet")
    assert call(index.main, capsys, data / "none-*.tar", *options).code == 2
    (data / "pairs" / "x.tar").write_bytes(b"no tar" * 1000)
    done = call(index.main, capsys, data / "pairs", *options)
    assert done.code == 2 and "x.tar" in done.err and not (data / "pairs" / "manifest.json").exists()


def test_validate_names_faults_and_counts_them(indexed: Path, capsys: Capture) -> None:
    manifest = indexed / "documents" / "manifest.json"
    options = ("--workers", "0", "--quiet")
    assert call(validate.main, capsys, manifest, *options).out == "no fault\n"
    shard = next((indexed / "documents").glob("*.tar"))
    flip(shard, 2000)
    done = call(validate.main, capsys, manifest, *options)
    assert done.code == 1
    assert done.out.splitlines()[:2] == [f"{shard} - sha256_differs", "1 faults"]
    done = call(validate.main, capsys, manifest, "--json", *options)
    fault, totals = map(json.loads, done.out.splitlines())
    assert fault == {"shard": str(shard), "key": "", "reason": "sha256_differs", "detail": ""}
    assert totals == {"faults": 1, "reasons": {"sha256_differs": 1}} and done.code == 1
    assert call(validate.main, capsys, indexed / "none.json", *options).code == 2


def test_every_reason_has_its_words() -> None:
    from megatron_atum.data.flags import FAULTS
    from megatron_atum.data.validating import REASONS

    assert not set(REASONS) & ({*FAULTS, *IMAGE_FAULTS} - {"missing_shard"})


def test_stats_of_a_run(indexed: Path, capsys: Capture) -> None:
    out, plot = indexed / "stats.json", indexed / "stats.png"
    options = ("--packs", "300", "--json", out, "--plot", plot)
    done = call(stats.main, capsys, "--config", indexed / "run.yaml", *options, "data.sequence_length=512")
    assert done.code == 0, done.err
    record = json.loads(out.read_text())
    web, captions, whole = record["mixture"]
    assert (web["asked"], captions["asked"]) == (0.75, 0.25)
    assert web["realised"] == pytest.approx(0.75, abs=0.01) and whole["rows"] == 300
    assert [source["usable"] for source in record["sources"]] == [12, 10]
    lines = done.out.splitlines()
    assert "mixture: published, 300 rows of 512 tokens planned" in lines
    assert any(line.split()[:4] == ["web", "1", "75.000", f"{100 * web['realised']:.3f}"] for line in lines)
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_stats_of_manifests(indexed: Path, capsys: Capture) -> None:
    done = call(stats.main, capsys, indexed / "documents/manifest.json", indexed / "pairs/manifest.json")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()[2:4]] == ["documents", "pairs"]
    assert "mixture" not in done.out


def test_stats_refuses_what_it_cannot_use(indexed: Path, capsys: Capture) -> None:
    assert "nothing to look at" in call(stats.main, capsys).err
    done = call(stats.main, capsys, indexed / "pairs/manifest.json", "--plot", indexed / "plot.nonsense")
    assert done.code == 2 and "plot.nonsense" in done.err
