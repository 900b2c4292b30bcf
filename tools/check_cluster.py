"""Is this cluster ready for a run? Versions, GPUs, network, clocks and storage, measured by the processes of a job.

    python tools/check_cluster.py                              # this machine: a process for each GPU, or two over gloo
    srun --nodes 64 --ntasks-per-node 8 python tools/check_cluster.py --cluster p4de --data /fsx/shards \\
        --checkpoints /fsx/runs
    torchrun --nnodes 2 --nproc-per-node 8 ... tools/check_cluster.py --cluster p4de

A table with one line per check (ok, warning, failed, or not checked with its reason), what to do, and a verdict. With
--cluster the bandwidths are compared with those that the planner counts on. A process that hangs is named, and the
table has what is known without it. The last line is one JSON object.

Exit codes, of all processes: 0 ok, with or without warnings; 1 something failed; 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_atum.errors import AtumError, ConfigError, first_line
from megatron_atum.launch.check_report import FAILED, Expected, Line, Node, result, table, verdict
from megatron_atum.launch.environment import prepare, read_text
from megatron_atum.launch.slurm import rank_variables

if TYPE_CHECKING:  # torch is imported only when its variables are set
    from megatron_atum.launch.check_exchange import Deadline, Exchange
    from megatron_atum.launch.check_host import Facts
    from megatron_atum.launch.check_nccl import NcclLog
    from megatron_atum.launch.check_storage import Moved

MIB = 2**20
RANKS = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", metavar="NAME", help="as tools/plan.py takes it: p4d, p4de-64, or a YAML file")
    parser.add_argument("--data", type=Path, metavar="PATH", help="a shard, or a folder of shards, to read from")
    parser.add_argument(
        "--checkpoints", type=Path, metavar="FOLDER", help="a folder to write to, as run folders are in"
    )
    parser.add_argument("--mib", type=int, metavar="N", help="of a message (1024 with GPUs, 8 without)")
    parser.add_argument(
        "--storage-mib", type=int, default=256, metavar="N", help="read and written by each process (256)"
    )
    parser.add_argument(
        "--timeout", type=float, default=120, metavar="S", help="longest wait for a process or a step (120)"
    )
    options = parser.parse_args()
    for name in ("mib", "storage_mib", "timeout"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    for name in ("data", "checkpoints"):
        if re.match(r"[a-z][a-z0-9+.-]*:/", str(getattr(options, name) or "")):
            parser.error(f"--{name} must be a file or folder; object stores are not measured")
    return options


def main() -> int:
    options = parse_arguments()
    expected = expected_of(options.cluster)
    os.environ.update(rank_variables(os.environ))
    if "RANK" not in os.environ:
        return start_here()
    if missing := [name for name in RANKS if name not in os.environ]:
        raise ConfigError(f"RANK is set, but not {', '.join(missing)}; start with srun or torchrun, or unset RANK")
    for note in prepare(os.environ):
        print(f"environment: {note}", flush=True)
    Check(options, expected).run()


def expected_of(cluster: str | None) -> Expected | None:
    """Raises ConfigError: there is no such cluster."""
    if cluster is None:
        return None
    from megatron_atum.planning.cluster import load_cluster

    found = load_cluster(cluster)
    links = found.node_link.bytes_per_s, found.network.bytes_per_s
    return Expected(found.name, found.device.name, found.devices_per_node, *links)


def start_here() -> int:
    """The processes of this machine, as torchrun would start them. Returns the exit code of the first."""
    count = gpus_here() or 2
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    defaults = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    try:
        for rank in range(count):
            environ = {**defaults, **os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen([sys.executable, *sys.argv], env=environ))
        codes = [process.wait() for process in processes]
        return codes[0]
    finally:
        for process in processes:
            process.kill()


def gpus_here() -> int:
    """0 also where nvidia-smi does not answer; the processes tell more about that."""
    try:
        done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


@dataclass
class Results:
    """Of one process; what it has come to so far."""

    rates: dict[str, float] = field(default_factory=dict)
    problem: str = ""  # with the rates
    log: NcclLog | None = None
    read: Moved | None = None
    written: Moved | None = None


class Check:
    """One process of it. Rank 0 collects, judges and shows; the others do as it says."""

    def __init__(self, options: argparse.Namespace, expected: Expected | None) -> None:
        from megatron_atum.launch.check_exchange import Exchange

        self.options, self.expected = options, expected
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.is_first_of_host = self.rank % int(os.environ["LOCAL_WORLD_SIZE"]) == 0
        self.results = Results()
        self.last_words_s = min(10.0, options.timeout / 4)  # for the others to tell what they know when one hangs
        self.nodes: list[Node] = []
        self.lines: list[Line] = []  # of rank 0, as far as they are known
        self.facts: dict[int, Facts] = {}
        self.has_measured = False
        self.nccl_log: Path | None = None
        try:
            self.exchange = Exchange(self.rank, self.world_size, options.timeout)
        except RuntimeError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise ConfigError(
                f"rank {self.rank} cannot reach rank 0 at {where}: {first_line(error)}; see whether rank 0 has started "
                "there, and whether a firewall or security group is in between"
            ) from None

    def run(self) -> NoReturn:
        from megatron_atum.launch.check_exchange import Deadline

        self.exchange.tell("facts", self._own_facts())
        if self.rank == 0:
            self._judge_facts()
        # Later than rank 0 gives up waiting.
        self.nodes = self.exchange.announced("nodes", 2 * self.options.timeout) or []
        if self.nodes:
            self._compare_clocks()
            last_words = self.exchange.second()
            deadline = Deadline(self.options.timeout, lambda step: self._stands_still(step, last_words))
            self._measure(deadline)
            self._move_files(deadline)
            deadline.close()
        self._finish(self.exchange, self.options.timeout)

    def _own_facts(self) -> Facts:
        import torch

        from megatron_atum.launch.check_host import gather_facts

        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
        versions = {"torch": torch.__version__, "CUDA": torch.version.cuda or "none", "NCCL": nccl}
        return gather_facts(torch.cuda.device_count(), versions, of_host=self.is_first_of_host)

    # Rank 0 on what hosts say of themselves ---------------------------------------------------------------------------

    def _judge_facts(self) -> None:
        from megatron_atum.launch.check_gpus import gpu_lines, xid_line
        from megatron_atum.launch.check_host import (
            efa_line,
            gpus_of,
            limit_line,
            nodes_of,
            process_line,
            version_line,
            visible_line,
        )
        from megatron_atum.parallel.device import backend

        facts = self.facts = self.exchange.heard("facts", self.options.timeout)
        missing = [rank for rank in range(self.world_size) if rank not in facts]
        nodes, wrong = nodes_of(facts)
        processes = process_line(nodes, wrong, missing, self.world_size, backend(), self.expected)
        blind = visible_line(facts, nodes)
        hosts = {node.label: facts[node.ranks[0]] for node in nodes if facts[node.ranks[0]].gpus is not None}
        gpus = {label: one.gpus for label, one in hosts.items() if one.gpus is not None}
        visible = {node.label: gpus_of(facts, node) for node in nodes if node.label in hosts}
        self.lines = [
            processes,
            version_line(facts, nodes),
            *gpu_lines(gpus, visible, {node.label: len(node.ranks) for node in nodes}, self.expected),
            *([blind] if blind else []),
            xid_line({label: one.kernel for label, one in hosts.items()}, gpus=any(visible.values())),
            limit_line(hosts, self.world_size),
            efa_line({label: one.fabric for label, one in hosts.items()}),
        ]
        can_go_on = processes.status != FAILED and blind is None
        self.exchange.announce("nodes", nodes if can_go_on else [])

    def _compare_clocks(self) -> None:
        from megatron_atum.launch.check_exchange import clock_offsets, tell_time
        from megatron_atum.launch.check_host import clock_line

        asked = {node.ranks[0]: node.label for node in self.nodes[1:]}
        if self.rank == 0:
            offsets = clock_offsets(self.exchange, asked, self.options.timeout / 4)
            missing = [label for rank, label in asked.items() if rank not in offsets]
            self.lines.append(clock_line({asked[rank]: offset for rank, offset in offsets.items()}, missing))
        elif self.rank in asked:
            tell_time(self.exchange, self.options.timeout)

    # All ranks --------------------------------------------------------------------------------------------------------

    def _measure(self, deadline: Deadline) -> None:
        from megatron_atum.launch.check_nccl import DEBUG
        from megatron_atum.parallel.device import has_accelerator

        if has_accelerator():
            self.nccl_log = Path(tempfile.mkdtemp(prefix="check-cluster-")) / "log"
            os.environ.update(DEBUG, NCCL_DEBUG_FILE=str(self.nccl_log))
        try:
            self._measure_links(deadline)
        except RuntimeError as error:
            self.results.problem = f"rank {self.rank} on {socket.gethostname()}: {first_line(error)}"
        self.has_measured = True

    def _measure_links(self, deadline: Deadline) -> None:
        import torch
        import torch.distributed as dist

        from megatron_atum.launch.check_links import measure
        from megatron_atum.parallel.device import backend, device, has_accelerator

        # With NCCL a collective that is late ends the process; the deadline must come first.
        timeout_s = self.options.timeout * (3 if has_accelerator() else 0.8)
        if has_accelerator():
            torch.cuda.set_device(device())
        deadline.step("start of the process group")
        dist.init_process_group(
            backend(),
            store=dist.PrefixStore("group", self.exchange.store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        size = (self.options.mib or (1024 if has_accelerator() else 8)) * MIB
        self.results.rates = measure(self.nodes, self.rank, size, timeout_s, deadline.step)

    def _move_files(self, deadline: Deadline) -> None:
        from megatron_atum.launch.check_storage import read_files, write_file

        size = self.options.storage_mib * MIB
        if self.options.data is not None:
            deadline.step(f"reading {self.options.data}")
            self.results.read = read_files(self.options.data, self.rank, size)
        if self.options.checkpoints is not None:
            deadline.step(f"writing to {self.options.checkpoints}")
            self.results.written = write_file(self.options.checkpoints, self.rank, size)

    def _stands_still(self, step: str, exchange: Exchange) -> None:
        """In the deadline's thread, while the main thread waits for something that does not come."""
        still = f"rank {self.rank} on {socket.gethostname()} stands still for {self.options.timeout:g} s in: {step}"
        print(f"check_cluster: {still}", file=sys.stderr, flush=True)
        if not self.has_measured:  # else there are no numbers of the storage, which says enough
            self.results.problem = still
        self._finish(exchange, self.last_words_s)

    # The end ----------------------------------------------------------------------------------------------------------

    def _finish(self, exchange: Exchange, timeout_s: float) -> NoReturn:
        """Tell rank 0, which shows the table; all end with the code that it says."""
        from megatron_atum.launch.check_nccl import read_log

        if self.nccl_log is not None:
            self.results.log = read_log(read_text(self.nccl_log))
            shutil.rmtree(self.nccl_log.parent, ignore_errors=True)
        exchange.tell("results", self.results)
        results: dict[int, Results] = {}
        if self.rank == 0:
            results = exchange.heard("results", timeout_s + self.last_words_s, self.facts)
            found = self._report(results)
            print(json.dumps(found), flush=True)
            # Last: when the others end with code 1, the launcher may end this process too.
            exchange.announce("code", int(found["result"] == FAILED))
        code = exchange.announced("code", 2 * (timeout_s + self.last_words_s))
        if code is None:
            print(f"check_cluster: rank {self.rank}: rank 0 is gone", file=sys.stderr, flush=True)
        else:
            exchange.leave(len(results))
        os._exit(1 if code is None else code)  # a normal end would wait for groups that have failed

    def _report(self, results: dict[int, Results]) -> dict[str, Any]:
        lines = [*self.lines]
        rates: dict[str, float] = {}
        if self.nodes:
            measured, rates = self._judge_results(results)
            lines += measured
        print(f"\n{table(lines)}\n\n{verdict(lines)}")
        return {
            "result": result(lines),
            "nodes": len(self.nodes),
            "processes": self.world_size,
            "bytes_per_s": rates,
            "lines": [asdict(line) for line in lines],
        }

    def _judge_results(self, results: dict[int, Results]) -> tuple[list[Line], dict[str, float]]:
        from megatron_atum.launch.check_links import link_lines
        from megatron_atum.launch.check_nccl import network_line
        from megatron_atum.launch.check_storage import storage_line

        silent = [f"rank {rank} on {self.facts[rank].host} said nothing" for rank in self.facts if rank not in results]
        problems = [one.problem for one in results.values() if one.problem] + silent
        logs = {f"rank {rank}": one.log for rank, one in results.items() if one.log is not None}
        efa = any(facts.fabric.platform.efa for facts in self.facts.values())
        links, rates = link_lines(
            {rank: one.rates for rank, one in results.items()}, problems, self.nodes, self.expected
        )
        read = {rank: one.read for rank, one in results.items() if one.read is not None}
        written = {rank: one.written for rank, one in results.items() if one.written is not None}
        lines = [
            network_line(logs, efa=efa, several_nodes=len(self.nodes) > 1),
            *links,
            storage_line("read data", self.options.data, "--data", read, self.nodes),
            storage_line("write checkpoints", self.options.checkpoints, "--checkpoints", written, self.nodes),
        ]
        return lines, rates


if __name__ == "__main__":
    try:
        exit_code = main()
    except (AtumError, OSError) as error:
        print(f"check_cluster: {error}", file=sys.stderr)
        exit_code = 2
    except KeyboardInterrupt:
        exit_code = 130
    sys.exit(exit_code)
