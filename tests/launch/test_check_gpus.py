"""The state of GPUs, from what nvidia-smi and the kernel's log say."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_atum.launch import check_gpus
from megatron_atum.launch.check_gpus import (
    Gpu,
    GpuReport,
    KernelLog,
    Xid,
    ask_gpus,
    ask_kernel,
    gpu_lines,
    read_kernel_log,
    read_smi,
    xid_line,
)
from megatron_atum.launch.check_report import FAILED, NOT_CHECKED, OK, WARNING, Expected

COUNTS = "<sram_correctable>0</sram_correctable><sram_uncorrectable_parity>{}</sram_uncorrectable_parity>"
NEW = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
  <driver_version>580.65.06</driver_version>
  <attached_gpus>2</attached_gpus>
  <gpu id="00000000:10:1C.0">
    <product_name>NVIDIA A100-SXM4-40GB</product_name>
    <ecc_mode><current_ecc>Enabled</current_ecc></ecc_mode>
    <ecc_errors>
      <volatile>
        <sram_correctable>3</sram_correctable>
        <sram_uncorrectable_parity>0</sram_uncorrectable_parity>
        <sram_uncorrectable_secded>0</sram_uncorrectable_secded>
        <dram_correctable>7</dram_correctable>
        <dram_uncorrectable>0</dram_uncorrectable>
      </volatile>
      <aggregate>
        <sram_uncorrectable_parity>0</sram_uncorrectable_parity>
        <dram_uncorrectable>0</dram_uncorrectable>
        <sram_threshold_exceeded>No</sram_threshold_exceeded>
      </aggregate>
      <aggregate_uncorrectable_sram_sources><sram_l2>5</sram_l2></aggregate_uncorrectable_sram_sources>
    </ecc_errors>
    <remapped_rows>
      <remapped_row_pending>No</remapped_row_pending><remapped_row_failure>No</remapped_row_failure>
    </remapped_rows>
  </gpu>
  <gpu id="00000000:10:1D.0">
    <product_name>NVIDIA A100-SXM4-40GB</product_name>
    <ecc_mode><current_ecc>Enabled</current_ecc></ecc_mode>
    <ecc_errors>
      <volatile>
        <sram_uncorrectable_parity>1</sram_uncorrectable_parity>
        <sram_uncorrectable_secded>N/A</sram_uncorrectable_secded>
        <dram_uncorrectable>2</dram_uncorrectable>
      </volatile>
      <aggregate><dram_uncorrectable>9</dram_uncorrectable></aggregate>
    </ecc_errors>
    <remapped_rows>
      <remapped_row_pending>Yes</remapped_row_pending><remapped_row_failure>Yes</remapped_row_failure>
    </remapped_rows>
  </gpu>
</nvidia_smi_log>
"""
OLD = """<nvidia_smi_log>
  <driver_version>418.87</driver_version>
  <gpu id="00000000:00:1E.0">
    <product_name>Tesla V100</product_name>
    <ecc_errors><volatile>
      <single_bit><total>4</total></single_bit><double_bit><device_memory>2</device_memory><total>2</total></double_bit>
    </volatile></ecc_errors>
    <retired_pages><pending_retirement>Yes</pending_retirement></retired_pages>
  </gpu>
</nvidia_smi_log>
"""
GOOD = Gpu("NVIDIA A100-SXM4-40GB", "00000000:10:1C.0", "Enabled", 0, 0, False, False)
BAD = Gpu("NVIDIA A100-SXM4-40GB", "00000000:10:1D.0", "Enabled", 3, 9, True, True)
HEALTHY = GpuReport("580.65.06", (GOOD, GOOD))
P4D = Expected("p4d", "A100-SXM4-40GB", 8, 1.0, 1.0)


def changed(gpu: Gpu, **values: object) -> Gpu:
    return Gpu(**{**vars(gpu), **values})  # type: ignore[arg-type]


def test_nvidia_smi_is_understood() -> None:
    assert read_smi(NEW) == GpuReport("580.65.06", (GOOD, BAD))
    (old,) = read_smi(OLD).gpus
    assert old == Gpu("Tesla V100", "00000000:00:1E.0", "N/A", 2, 0, True, False)
    worn = NEW.replace("<sram_threshold_exceeded>No", "<sram_threshold_exceeded>Yes")
    assert read_smi(worn).gpus[0] == changed(GOOD, is_worn=True)


@pytest.mark.parametrize(
    ("script", "report"),
    [
        (f"cat <<'END'\n{NEW}\nEND", GpuReport("580.65.06", (GOOD, BAD))),
        ("echo 'No devices were found'; exit 6", GpuReport(problem="nvidia-smi failed: No devices were found")),
        ("exit 9", GpuReport(problem="nvidia-smi failed: exit code 9")),
        ("echo not XML", GpuReport(problem="nvidia-smi failed: syntax error: line 1, column 0")),
        ("exec sleep 60", GpuReport(problem="nvidia-smi did not answer within 1 s")),
        (None, GpuReport(problem="there is no nvidia-smi", has_tool=False)),
    ],
)
def test_nvidia_smi_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None, report: GpuReport
) -> None:
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr(check_gpus, "WAIT_S", 1.0)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if script else str(tmp_path))
    assert ask_gpus() == report


KERNEL = """
[    5.123456] nvidia: loading out-of-tree module taints kernel.
[ 1000.500000] NVRM: Xid (PCI:0000:10:1c): 63, pid=1896, Row Remapper: New row marked for remapping, reset gpu
[90000.000000] NVRM: Xid (PCI:0000:a0:1d): 79, GPU has fallen off the bus.
NVRM: Xid (0000:01:00): 13, Graphics Exception
"""


def test_the_kernel_log_is_understood() -> None:
    assert read_kernel_log(KERNEL, 93600.0) == (
        Xid("0000:10:1c", 63, 92599.5, "pid=1896, Row Remapper: New row marked for remapping, reset gpu"),
        Xid("0000:a0:1d", 79, 3600.0, "GPU has fallen off the bus."),
        Xid("0000:01:00", 13, None, "Graphics Exception"),
    )


def test_the_kernel_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "dmesg"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for script, expected in (
        (
            "echo 'NVRM: Xid (PCI:0000:a0:1d): 79, off the bus'",
            KernelLog((Xid("0000:a0:1d", 79, None, "off the bus"),)),
        ),
        (
            "echo 'dmesg: read kernel buffer failed: Operation not permitted' >&2; exit 1",
            KernelLog(problem="dmesg: read kernel buffer failed: Operation not permitted"),
        ),
    ):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        assert ask_kernel() == expected
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "dmesg" in ask_kernel().problem


@pytest.mark.parametrize(
    ("reports", "visible", "processes", "status", "found"),
    [
        ([HEALTHY, HEALTHY], [2, 2], 2, OK, "2 x NVIDIA A100-SXM4-40GB, driver 580.65.06"),
        ([HEALTHY, HEALTHY], [2, 1], 2, FAILED, "580.65.06 on n0; 1 x"),
        ([HEALTHY, HEALTHY], [0, 0], 2, FAILED, "torch sees none, nvidia-smi 2"),
        ([HEALTHY, HEALTHY], [1, 1], 1, WARNING, "nvidia-smi shows more on n0, n1"),
        ([HEALTHY, HEALTHY], [2, 2], 1, WARNING, "1 processes on n0, n1"),
        ([HEALTHY, GpuReport("535.1", (GOOD, GOOD))], [2, 2], 2, WARNING, "580.65.06 on n0; 2 x NVIDIA A100-SXM4"),
    ],
)
def test_number_of_gpus(reports: list[GpuReport], visible: list[int], processes: int, status: str, found: str) -> None:
    line, memory = gpu_lines(named(reports), named(visible), dict.fromkeys(("n0", "n1"), processes))
    assert (line.name, line.status, bool(line.advice)) == ("GPUs", status, status != OK)
    assert found in line.found
    assert memory.status == OK


def named(values: list) -> dict:  # type: ignore[type-arg]
    return {f"n{number}": value for number, value in enumerate(values)}


@pytest.mark.parametrize(
    ("gpu", "status", "found"),
    [
        (changed(GOOD, uncorrectable=1), FAILED, "n0 00000000:10:1C.0: 1 uncorrectable since the driver was loaded"),
        (changed(GOOD, needs_reset=True), FAILED, "waits for a reset"),
        (changed(GOOD, is_worn=True), FAILED, "worn out"),
        (changed(GOOD, uncorrectable_ever=4), WARNING, "4 uncorrectable, all earlier"),
        (changed(GOOD, ecc="Disabled"), WARNING, "ECC is off on 1 GPUs"),
        (GOOD, OK, "none"),
    ],
)
def test_memory_errors(gpu: Gpu, status: str, found: str) -> None:
    _, line = gpu_lines({"n0": GpuReport("580", (gpu, GOOD))}, {"n0": 2}, {"n0": 2})
    assert (line.name, line.status) == ("GPU memory errors", status)
    assert found in line.found


def test_gpus_that_cannot_be_asked() -> None:
    missing, hangs = GpuReport(problem="there is no nvidia-smi", has_tool=False), GpuReport(problem="did not answer")
    _, line = gpu_lines({"n0": missing, "n1": missing}, {"n0": 8, "n1": 8}, {"n0": 8, "n1": 8})
    assert (line.status, line.found) == (WARNING, "not readable: there is no nvidia-smi (n0, n1)")
    _, line = gpu_lines({"n0": HEALTHY, "n1": hangs}, {"n0": 2, "n1": 2}, {"n0": 2, "n1": 2})
    assert (line.status, line.found) == (FAILED, "not readable: did not answer (n1)")


def test_a_host_without_gpus() -> None:
    missing = {"n0": GpuReport(problem="there is no nvidia-smi", has_tool=False)}
    for expected in (None, Expected("laptop", "CPU core", 2, 1.0, 1.0)):
        lines = gpu_lines(missing, {"n0": 0}, {"n0": 2}, expected)
        assert [line.status for line in lines] == [NOT_CHECKED, NOT_CHECKED]
    line, _ = gpu_lines(missing, {"n0": 0}, {"n0": 2}, P4D)
    assert (line.status, line.found) == (FAILED, "none; p4d has 8 x A100-SXM4-40GB")


@pytest.mark.parametrize(
    ("log", "status", "found"),
    [
        (KernelLog(), OK, "none"),
        (KernelLog((Xid("b", 79, 60.0, ""),)), FAILED, "n0 b: Xid 79 (fell off the bus, 0.0 h ago)"),
        (KernelLog((Xid("b", 95, None, ""),)), FAILED, "Xid 95 (uncontained memory error)"),
        (KernelLog((Xid("b", 79, 90000.0, ""),)), WARNING, "Xid 79"),
        (KernelLog((Xid("b", 31, 60.0, "MMU fault"),)), WARNING, "Xid 31 (MMU fault, 0.0 h ago)"),
        (KernelLog(problem="Operation not permitted"), WARNING, "not readable: Operation not permitted (n0)"),
    ],
)
def test_xids(log: KernelLog, status: str, found: str) -> None:
    line = xid_line({"n0": log}, gpus=True)
    assert line.status == status
    assert found in line.found
    assert xid_line({"n0": log}, gpus=False).status == NOT_CHECKED


def test_fresh_errors_of_one_host_count_more_than_unread_ones_of_another() -> None:
    line = xid_line({"n0": KernelLog(problem="no"), "n1": KernelLog((Xid("b", 48, 1.0, ""),))}, gpus=True)
    assert line.status == FAILED


def test_real_programs_are_asked_here() -> None:
    """Whatever there is: no exception, and a reason where nothing can be read."""
    report, log = ask_gpus(), ask_kernel()
    assert report.gpus or report.problem
    assert isinstance(log.xids, tuple)
    assert bool(log.problem) == (subprocess.run(["dmesg"], capture_output=True).returncode != 0)
