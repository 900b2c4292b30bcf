"""What of a checkout goes along with a SageMaker job."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_atum.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "sagemaker"))
sagemaker_code = importlib.import_module("sagemaker_code")

FILES = {
    ".gitignore": "runs/\n*.weights\n__pycache__/\n",
    "setup.py": "",
    "pretrain_atum.py": "",
    "megatron_atum/__init__.py": "",
    "megatron_atum/__pycache__/x.pyc": "",
    "examples/a.yaml": "",
    "examples/old.yaml": "",
    "examples/large.weights": "x" * 2000,
    "tools/plan.py": "",
    "runs/mine.yaml": "",
}
CODE = {"pretrain_atum.py", "megatron_atum/__init__.py", "megatron_atum/REVISION", "examples/a.yaml", "tools/plan.py"}
CONFIG = Path("examples/a.yaml")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Of git; examples/new.yaml is not added yet, examples/old.yaml is deleted."""
    root = tmp_path / "checkout"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm one"):
        subprocess.run(["git", *command.split()], cwd=root, check=True)
    (root / "examples" / "new.yaml").touch()
    (root / "examples" / "old.yaml").unlink()
    return root


def packed(root: Path, config: Path = CONFIG) -> set[str]:
    folder = root.parent / "packed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    sagemaker_code.pack(root, config, folder)
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_code_of_a_checkout_goes_along_with_its_commit(checkout: Path) -> None:
    assert packed(checkout) == CODE | {"examples/new.yaml"}
    revision = (checkout.parent / "packed" / "megatron_atum" / "REVISION").read_text()
    assert revision.startswith("commit ") and revision.endswith(", with changes\n")
    assert packed(checkout, Path("runs/mine.yaml")) == CODE | {"examples/new.yaml", "runs/mine.yaml"}


def test_code_goes_along_without_git(checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    everything = CODE | {"examples/new.yaml", "examples/large.weights"}
    assert packed(checkout) == everything
    subprocess.run(["git", "init", "-q"], cwd=checkout.parent, check=True)
    (checkout.parent / ".gitignore").write_text("*\n")
    assert packed(checkout) == everything, "the checkout around it is of something else"


@pytest.mark.parametrize("with_git", [True, False])
@pytest.mark.parametrize("link", ["examples/data", "megatron_atum/linked.py"])
def test_links_are_refused(checkout: Path, link: str, with_git: bool) -> None:
    (checkout / link).symlink_to("/etc" if link == "examples/data" else "/etc/hostname")
    if not with_git:
        shutil.rmtree(checkout / ".git")
    with pytest.raises(ConfigError, match=f"{checkout / link} is a link"):
        packed(checkout)


def test_more_than_code_takes_is_refused(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sagemaker_code, "MOST_CODE_BYTES", 1500)
    packed(checkout)  # what is ignored stays here
    shutil.rmtree(checkout / ".git")
    with pytest.raises(ConfigError, match=f"{checkout}/examples has 0 of them: keep data elsewhere"):
        packed(checkout)
