"""The cost model against what others measured. No constant was chosen to meet it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_atum.planning.measured import STEPS, measured_rows
from megatron_atum.planning.published import LLAMA, MEGATRON, Megatron, a100_pod, transformer_job, validation_rows

BILLIONS = {"Megatron 22B": 22, "Megatron 175B": 175, "Megatron 530B": 530, "Megatron 1T": 1008}


def test_megatron_within_ten_percent() -> None:
    errors = {row.name: row.error for row in validation_rows() if row.binding}
    assert len(errors) == 8  # four models, two kinds of recomputation
    assert {name: error for name, error in errors.items() if abs(error) > 10} == {}


def test_llama_is_plausible_at_the_layouts_guessed() -> None:
    rows = [row for row in validation_rows() if not row.binding]
    assert len(rows) == 4
    assert all("not published" in row.name and abs(row.error) < 20 for row in rows)


def test_our_own_steps_within_ten_percent() -> None:
    rows = measured_rows()
    assert len(rows) == len(STEPS) == 4 and all(row.binding for row in rows)
    assert {row.name: row.error for row in rows if abs(row.error) > 10} == {}


def test_our_own_steps_are_those_of_the_benchmark() -> None:
    file = json.loads((Path(__file__).parents[2] / "benchmarks/results/gpu_step.json").read_text())
    assert "H200" in file["gpu"]
    found = {
        (row["length"], row["images"], row["rows"]): row["step_s"]
        for row in file["rows"]
        if row["who"] == "this project"
    }
    for step in STEPS:
        assert found[step.length, str(step.images), step.rows] == pytest.approx(step.seconds, abs=5e-4)


def test_an_error_is_signed_and_in_percent() -> None:
    row = validation_rows()[0]
    assert row.measured == 1.10
    assert row.error == pytest.approx(100 * (row.prediction.step_s - 1.10) / 1.10)


@pytest.mark.parametrize("entry", MEGATRON, ids=lambda entry: entry.name)
def test_the_published_rows_agree_with_themselves(entry: Megatron) -> None:
    """Seconds, shapes and MFU of the paper: its formula (1) over the published seconds gives its MFU."""
    m, run = entry.model, entry.run
    assert m.parameters / 1e9 == pytest.approx(BILLIONS[entry.name], rel=0.01)
    s, h, layers, vocabulary = m.sequence, m.hidden, m.layers, m.vocabulary
    flops = 72 * run.rows * s * layers * h**2 * (1 + s / (6 * h) + vocabulary / (12 * h * layers))
    assert flops / (run.world_size * 312e12 * entry.selective_s) == pytest.approx(entry.mfu, rel=0.01)
    assert run.tensor * run.pipeline * run.data == run.world_size
    assert layers % (run.pipeline * run.virtual) == 0


def test_a_job_computes_the_published_flops() -> None:
    """6 for each parameter and token in products, of which the embedding is none; attention is not halved."""
    for entry in MEGATRON:
        m, run = entry.model, entry.run
        job = transformer_job(m, run, a100_pod(run.world_size))
        blocks = [block for stage in job.stages for block in stage]
        tokens = run.microbatch * m.sequence
        products = sum(block.gemm_forward + block.gemm_backward for block in blocks)
        assert products == pytest.approx(6 * tokens * m.parameters)
        attention = sum(block.attention_forward + block.attention_backward for block in blocks)
        assert attention == pytest.approx(4 * 4 * m.layers * tokens * m.sequence * m.hidden)  # recomputed once


def test_llama_has_its_parameters() -> None:
    assert LLAMA.parameters == pytest.approx(65.3e9, rel=0.005)
