"""Which code this is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import megatron_atum
from megatron_atum.config import revision
from megatron_atum.config.revision import git_state


def test_the_state_of_the_code(tmp_path: Path) -> None:
    code = tmp_path / "code.py"
    assert git_state(code) == "no git checkout"

    def git(*arguments: str) -> str:
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    code.write_text("1")
    git("add", ".")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert git_state(code) == f"commit {commit}"
    code.write_text("2")
    assert git_state(code) == f"commit {commit}, with changes"

    installed = tmp_path / ".venv" / "package" / "code.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("3")
    assert git_state(installed) == "no git checkout", "the commit would be that of another project"

    (tmp_path / "REVISION").write_text("commit 1, that this was once\n")
    (installed.parent / "REVISION").write_text("commit 2, with changes\n")
    assert git_state(code) == f"commit {commit}, with changes", "git knows better"
    assert git_state(installed) == "commit 2, with changes"


def test_the_file_lies_where_the_package_does() -> None:
    (default,) = revision.git_state.__defaults__ or ()
    assert default == Path(megatron_atum.__file__)
