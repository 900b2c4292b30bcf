"""The state of a host's GPUs, from nvidia-smi and the kernel's log."""

from __future__ import annotations

import re
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_atum.errors import first_line, listed
from megatron_atum.launch.check_report import FAILED, NOT_CHECKED, OK, WARNING, Expected, Line, spread

WAIT_S = 30.0
# Of NVIDIA's catalogue of Xids (docs.nvidia.com/deploy/xid-errors) those that mean the device itself. The others are
# mostly errors of programs: an address that is not there, a kernel that was stopped.
OF_HARDWARE = {
    48: "double-bit ECC error",
    62: "internal micro-controller halt",
    64: "a memory row could not be replaced",
    74: "NVLink error",
    79: "fell off the bus",
    95: "uncontained memory error",
    119: "GPU system processor does not answer",
    120: "GPU system processor error",
}
_MEMORY = "GPU memory errors"
_DRAIN = "drain the node and reset its GPUs; replace one that does it again"
_NO_GPU = (
    "start the container with its GPUs (--gpus all); use torch's CUDA build, and a driver that is not older than it"
)
RECENT_S = 24 * 3600.0


@dataclass(frozen=True)
class Gpu:
    name: str
    bus: str
    ecc: str  # Enabled, Disabled, N/A
    uncorrectable: int  # memory errors since the driver was loaded
    uncorrectable_ever: int
    needs_reset: bool  # a memory row or page is to be replaced
    is_worn: bool  # and could not be, or there were too many errors: NVIDIA exchanges such a GPU


@dataclass(frozen=True)
class GpuReport:
    driver: str = ""
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""  # why there is none
    has_tool: bool = True  # nvidia-smi is there


@dataclass(frozen=True)
class Xid:
    bus: str
    number: int
    age_s: float | None  # None: the log does not say
    text: str


@dataclass(frozen=True)
class KernelLog:
    xids: tuple[Xid, ...] = ()
    problem: str = ""  # why it cannot be read


def ask_gpus() -> GpuReport:
    try:
        return read_smi(_output("nvidia-smi", "-q", "-x"))
    except FileNotFoundError:
        return GpuReport(problem="there is no nvidia-smi", has_tool=False)
    except subprocess.TimeoutExpired:
        return GpuReport(problem=f"nvidia-smi did not answer within {WAIT_S:.0f} s")
    except (OSError, subprocess.SubprocessError, ElementTree.ParseError) as error:
        return GpuReport(problem=f"nvidia-smi failed: {_reason(error)}")


def ask_kernel() -> KernelLog:
    try:
        with open("/proc/uptime") as file:
            uptime_s = float(file.read().split()[0])
        return KernelLog(read_kernel_log(_output("dmesg"), uptime_s))
    except (OSError, subprocess.SubprocessError) as error:
        return KernelLog(problem=_reason(error))


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=WAIT_S, check=True)
    return done.stdout


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        said = (error.stderr or "").strip() or (error.stdout or "").strip() or f"exit code {error.returncode}"
        return said.splitlines()[-1]
    return first_line(error)


def read_smi(text: str) -> GpuReport:
    """The XML of `nvidia-smi -q -x`. Raises ElementTree.ParseError."""
    root = ElementTree.fromstring(text)
    return GpuReport(root.findtext("driver_version", ""), tuple(_gpu(node) for node in root.findall("gpu")))


def _gpu(node: ElementTree.Element) -> Gpu:
    pending = (
        "remapped_rows/remapped_row_pending",
        "retired_pages/pending_retirement",
        "retired_pages/pending_blacklist",
    )
    worn = ("remapped_rows/remapped_row_failure", "ecc_errors/aggregate/sram_threshold_exceeded")
    return Gpu(
        name=node.findtext("product_name", ""),
        bus=node.get("id", ""),
        ecc=node.findtext("ecc_mode/current_ecc", "N/A"),
        uncorrectable=_uncorrectable(node.find("ecc_errors/volatile")),
        uncorrectable_ever=_uncorrectable(node.find("ecc_errors/aggregate")),
        needs_reset=any(node.findtext(path) == "Yes" for path in pending),
        is_worn=any(node.findtext(path) == "Yes" for path in worn),
    )


def _uncorrectable(node: ElementTree.Element | None) -> int:
    """The names depend on GPU and driver: dram_uncorrectable, sram_uncorrectable_parity; double_bit/total before."""
    if node is None:
        return 0
    counts = [leaf.text or "" for leaf in node.iter() if "uncorrectable" in leaf.tag]
    counts.append(node.findtext("double_bit/total", ""))
    return sum(int(count) for count in counts if count.strip().isdecimal())


def read_kernel_log(text: str, uptime_s: float) -> tuple[Xid, ...]:
    """Lines such as `[43625.2] NVRM: Xid (PCI:0000:10:1c): 63, pid=1896, Row Remapper: ...`."""
    found = []
    for line in text.splitlines():
        match = re.search(r"NVRM: Xid \((?:PCI:)?([\w:.]+)\): (\d+)(?:, )?(.*)", line)
        if match:
            stamp = re.match(r"\[ *(\d+\.\d+)\]", line)
            age_s = uptime_s - float(stamp[1]) if stamp else None
            found.append(Xid(match[1], int(match[2]), age_s, match[3].strip()))
    return tuple(found)


def gpu_lines(
    reports: Mapping[str, GpuReport],
    visible: Mapping[str, int],
    processes: Mapping[str, int],
    expected: Expected | None = None,
) -> list[Line]:
    """Number and kind, and memory errors.

    Args:
        reports: by host.
        visible: by host, GPUs that torch sees there.
        processes: by host.
    """
    problems = {label: report.problem for label, report in reports.items() if report.problem}
    if not any(visible.values()) and not any(report.has_tool for report in reports.values()):
        nothing = Line(_MEMORY, NOT_CHECKED, "no GPUs")
        if expected is None or expected.device.startswith("CPU"):
            return [Line("GPUs", NOT_CHECKED, "none"), nothing]
        found = f"none; {expected.cluster} has {expected.devices_per_node} x {expected.device}"
        return [Line("GPUs", FAILED, found, _NO_GPU), nothing]
    kinds = spread({label: _kinds(report, visible[label]) for label, report in reports.items()})
    count = _count_line(kinds, reports, visible, processes)
    return [count, _unread_line(problems, reports) if problems else _memory_line(reports)]


def _unread_line(problems: Mapping[str, str], reports: Mapping[str, GpuReport]) -> Line:
    found = f"not readable: {spread(problems)} ({listed(list(problems), 3)})"
    if not any(reports[label].has_tool for label in problems):
        return Line(_MEMORY, WARNING, found, "make nvidia-smi available in the container, to see the state of the GPUs")
    advice = "a GPU that does not answer keeps nvidia-smi waiting: drain the node and reboot it; see dmesg"
    return Line(_MEMORY, FAILED, found, advice)


def _kinds(report: GpuReport, visible: int) -> str:
    names = sorted({gpu.name for gpu in report.gpus})
    driver = f", driver {report.driver}" if report.driver else ""
    return f"{visible} x {' and '.join(names) or 'GPU'}{driver}"


def _count_line(
    kinds: str, reports: Mapping[str, GpuReport], visible: Mapping[str, int], processes: Mapping[str, int]
) -> Line:
    name = "GPUs"
    if len(set(visible.values())) > 1:
        return Line(name, FAILED, kinds, "all nodes must have equally many GPUs: leave out or mend those with fewer")
    if not any(visible.values()):
        shown = spread({label: f"{len(report.gpus)}" for label, report in reports.items()})
        return Line(name, FAILED, f"torch sees none, nvidia-smi {shown}", _NO_GPU)
    idle = [label for label, count in visible.items() if processes[label] < count]
    if idle:
        found = f"{kinds}; {processes[idle[0]]} processes on {listed(idle, 3)}"
        return Line(name, WARNING, found, "start a process for each GPU")
    hidden = [label for label, report in reports.items() if len(report.gpus) > visible[label]]
    if hidden:
        found = f"{kinds}; nvidia-smi shows more on {listed(hidden, 3)}"
        return Line(name, WARNING, found, "CUDA_VISIBLE_DEVICES hides some, or torch cannot open them")
    if len({_kinds(report, 0) for report in reports.values()}) > 1:
        return Line(name, WARNING, kinds, "the slowest kind sets the pace; use one driver")
    return Line(name, OK, kinds)


def _memory_line(reports: Mapping[str, GpuReport]) -> Line:
    gpus = [(f"{label} {gpu.bus}", gpu) for label, report in reports.items() for gpu in report.gpus]
    bad = [f"{place}: {fault}" for place, gpu in gpus for fault in _faults(gpu)]
    without = sum(gpu.ecc == "Disabled" for _, gpu in gpus)
    old = [
        f"{place}: {gpu.uncorrectable_ever} uncorrectable, all earlier" for place, gpu in gpus if gpu.uncorrectable_ever
    ]
    if bad:
        return Line(_MEMORY, FAILED, listed(bad, 5, "; "), _DRAIN)
    if without:
        return Line(_MEMORY, WARNING, f"ECC is off on {without} GPUs", "nvidia-smi -e 1, then reboot")
    if old:
        return Line(_MEMORY, WARNING, listed(old, 5, "; "), "watch these GPUs: their memory has failed before")
    return Line(_MEMORY, OK, "none")


def _faults(gpu: Gpu) -> list[str]:
    faults = [f"{gpu.uncorrectable} uncorrectable since the driver was loaded"] if gpu.uncorrectable else []
    faults += ["waits for a reset to replace memory"] if gpu.needs_reset else []
    return faults + (["its memory is worn out"] if gpu.is_worn else [])


def xid_line(logs: Mapping[str, KernelLog], *, gpus: bool) -> Line:
    """Args: logs: by host."""
    name = "Xid errors"
    if not gpus:
        return Line(name, NOT_CHECKED, "no GPUs")
    unread = {label: log.problem for label, log in logs.items() if log.problem}
    xids = [(f"{label} {xid.bus}: {_told(xid)}", xid) for label, log in logs.items() for xid in log.xids]
    fresh = [text for text, xid in xids if xid.number in OF_HARDWARE and (xid.age_s is None or xid.age_s < RECENT_S)]
    if fresh:
        return Line(name, FAILED, listed(fresh, 5, "; "), _DRAIN)
    if unread:
        found = f"not readable: {spread(unread)} ({listed(list(unread), 3)})"
        return Line(name, WARNING, found, "look at dmesg | grep Xid on the hosts as root")
    if xids:
        return Line(name, WARNING, listed([text for text, _ in xids], 5, "; "), "of programs, or older than a day")
    return Line(name, OK, "none since the hosts were started")


def _told(xid: Xid) -> str:
    age = "" if xid.age_s is None else f", {xid.age_s / 3600:.1f} h ago"
    return f"Xid {xid.number} ({OF_HARDWARE.get(xid.number) or xid.text[:60] or 'no text'}{age})"
