"""Environments of their own: made once, whole or not at all."""

from __future__ import annotations

import importlib.util
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import setuptools

from megatron_atum.errors import ConfigError
from megatron_atum.launch.own_environment import make_environment


def test_an_environment_is_made_once_and_anew_for_other_packages(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, requirements = tmp_path / "venvs" / "own", tmp_path / "requirements.txt"
    requirements.write_text("")
    python = make_environment(folder, requirements)
    assert (
        subprocess.run([python, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True).stdout
        == f"{folder}\n"
    )
    (folder / "mark").touch()
    make_environment(folder, requirements)
    assert (folder / "mark").exists()
    assert capfd.readouterr().err.count("making") == 1

    requirements.write_text("# others")
    with ThreadPoolExecutor(2) as pool:  # in two threads as in two processes
        again = pool.map(lambda _: make_environment(folder, requirements), range(2))
        assert list(again) == [python, python]
    assert not (folder / "mark").exists()
    (folder / "mark").touch()
    assert capfd.readouterr().err.count("making") == 1

    requirements.write_text("no-such-package-of-atum==1 @ nowhere\n")
    with pytest.raises(ConfigError, match="pip cannot install"):
        make_environment(folder, requirements)
    requirements.write_text("")
    make_environment(folder, requirements)  # what had failed does not count
    assert not (folder / "mark").exists()


def test_an_environment_shares_packages_and_takes_words(tmp_path: Path) -> None:
    (tmp_path / "own.py").touch()
    setup = "import os; from setuptools import setup; setup(name=os.environ['OWN'], version='1', py_modules=['own'])"
    (tmp_path / "setup.py").write_text(setup)
    python = make_environment(
        tmp_path / "venvs" / "own",
        [str(tmp_path)],
        shared_site=Path(setuptools.__file__).parents[1],
        options=["--no-build-isolation"],
        variables={"OWN": "own-of-atum"},
    )
    found = "import importlib.metadata, own, setuptools; print(importlib.metadata.version('own-of-atum'))"
    assert subprocess.run([python, "-c", found], capture_output=True, text=True).stdout == "1\n"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkout").touch()  # root may write to what is read only
    folder = tmp_path / "checkout" / "venvs" / "own"
    with pytest.raises(ConfigError, match=rf"cannot make {folder}.*use a checkout that can be written to"):
        make_environment(folder, [])


def test_a_python_without_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"has no pip; .*-m ensurepip may install it"):
        make_environment(tmp_path / "own", [])
