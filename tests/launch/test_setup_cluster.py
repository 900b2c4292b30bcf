"""tools/setup_cluster_tests.sh, with stand-ins for the programs that it looks for and calls."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USED = ("bash", "sh", "dirname", "chmod", "rm", "flock", "mktemp", "tail", "env", "cat", "touch")
PROGRAMS = ("slurmctld", "slurmd", "srun", "munged", "ip", "buildah", "busybox")


@dataclass(frozen=True)
class Machine:
    """Its programs, and a log of what apt-get was asked for."""

    folder: Path

    def put(self, name: str, body: str = "") -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def run(self) -> tuple[str, list[str]]:
        """What the script says, and the calls of apt-get."""
        environment = {"PATH": str(self.folder / "bin"), "POLICY_RC_D": str(self.folder / "policy"), "HOME": "/"}
        log = self.folder / "apt.log"
        log.unlink(missing_ok=True)
        command = ["bash", str(ROOT / "tools" / "setup_cluster_tests.sh")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0 and done.stdout == "", "it must not fail its caller"
        assert not (self.folder / "policy").exists(), "it must leave nothing behind"
        return done.stderr, log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Of root, with apt-get, which installs everything; it notes whether daemons could have been started."""
    machine = Machine(tmp_path)
    (tmp_path / "bin").mkdir()
    for name in USED:
        found = shutil.which(name)
        assert found is not None
        (tmp_path / "bin" / name).symlink_to(found)
    machine.put("id", "echo 0")
    bring = "; ".join(f"cp {tmp_path}/bin/id {tmp_path}/bin/{name}" for name in PROGRAMS)
    (tmp_path / "bin" / "cp").symlink_to(shutil.which("cp") or "")
    says = f'echo "$* policy=$({tmp_path}/policy; echo $?)" >>{tmp_path}/apt.log'
    machine.put("apt-get", f'{says}\ncase "$*" in *" install "*) {bring} ;; esac')
    return machine


def test_what_is_missing_is_installed_once_and_no_daemon_starts(machine: Machine) -> None:
    said, calls = machine.run()
    assert "installing Debian's packages" in said and "skipped" not in said
    assert [call.split()[-2] for call in calls[:1]] == ["update"]
    assert len(calls) == 2 and "--no-remove slurmctld slurmd slurm-client slurm-wlm munge iproute2" in calls[1]
    assert all(call.endswith("policy=101") for call in calls), "101 forbids to start daemons"
    assert machine.run() == ("", [])


def test_an_installation_that_fails_is_told(machine: Machine) -> None:
    machine.put("apt-get", "echo no such package >&2; exit 100")
    said, _ = machine.run()
    assert "apt-get failed:\nno such package" in said
    assert "will be skipped: slurmctld slurmd srun munged ip buildah busybox (Debian" in said


def test_without_apt_get_it_says_what_is_missing(machine: Machine) -> None:
    (machine.folder / "bin" / "apt-get").unlink()
    for name in PROGRAMS[:-1]:
        machine.put(name)
    said, _ = machine.run()
    assert said.startswith("setup: cluster tests that need these programs will be skipped: busybox (Debian:")


def test_for_other_users_it_does_nothing(machine: Machine) -> None:
    machine.put("id", "echo 1000")
    assert machine.run() == ("setup: cluster tests that need root will be skipped: this is user 1000\n", [])
