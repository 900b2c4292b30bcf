"""The image: what hadolint says of the Dockerfile, and its build on a stub of the base (image_builder.py)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_atum.errors import ConfigError, first_line
from megatron_atum.launch.own_environment import make_environment
from tests.launch.image_builder import CHANGES_TORCH, ENTRYPOINT, NO_PLUGIN, OTHER_TORCH, TORCH, Build, Builder

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
TOOLS = ROOT / "tools" / "container"


def default_of(argument: str) -> str:
    found = re.search(rf"^ARG {argument}=(.*)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert found is not None, argument
    return found[1]


# hadolint -------------------------------------------------------------------------------------------------------------


def lint(dockerfile: Path) -> subprocess.CompletedProcess[str]:
    """With the hadolint of the PATH, else of an environment that is made on first use."""
    program = shutil.which("hadolint")
    if program is None:
        try:
            python = make_environment(ROOT / ".venvs" / "hadolint", Path(__file__).with_name("hadolint.txt"))
        except ConfigError as error:
            pytest.skip(f"hadolint: {first_line(error)}")
        program = str(python.with_name("hadolint"))
    # Its own settings, not those of whoever runs this.
    command = [program, "--no-color", "--failure-threshold", "style", "--config", "/dev/null", str(dockerfile)]
    return subprocess.run(command, capture_output=True, text=True)


def test_hadolint_has_nothing_to_say(tmp_path: Path) -> None:
    done = lint(DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.read_text() + "RUN pip install numpy\n")
    assert lint(tmp_path / "Dockerfile").returncode == 1, "the check cannot fail"


# The build ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    for program, package in (("buildah", "buildah"), ("busybox", "busybox-static")):
        if shutil.which(program) is None:
            pytest.skip(f"root: needs the program {program} (Debian: apt-get install {package})")
    folder = tmp_path_factory.mktemp("buildah")
    builder = Builder(folder)
    builder.make_stub()
    yield builder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def full(builder: Builder) -> Build:
    """With EFA and SageMaker."""
    return builder.build(f"EFA_SHA256={builder.efa_sha256}", "SAGEMAKER=1", "REVISION=abc123")


def run_lines() -> list[str]:
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    return [line for line in joined.splitlines() if line.startswith("RUN ")]


@pytest.mark.root
def test_every_run_line_is_executed_with_its_arguments(full: Build) -> None:
    assert full.code == 0, full.output
    assert len([step for step in full.steps if step.startswith("RUN ")]) == len(run_lines()) == 4
    version, core = default_of("EFA_VERSION"), default_of("MEGATRON_CORE")
    installer = f"aws-efa-installer-{version}.tar.gz"
    pinned = {name: len(pins_of(TOOLS / name)) for name in ("requirements.txt", "sagemaker_toolkit.txt")}
    assert full.calls == [
        f"curl -fsSL --retry 3 -o TMP/{installer} {default_of('EFA_URL')}/{installer}",
        "apt-get update",
        "efa_installer.sh -y --skip-kmod --skip-limit-conf --no-verify",
        "ldconfig",
        "python -m venv --without-pip /opt/sagemaker",
        "pip --python /opt/sagemaker/bin/python install --no-cache-dir -r tools/container/sagemaker_toolkit.txt",
        f"tools/container/sagemaker_toolkit.txt: {pinned['sagemaker_toolkit.txt']} pins",
        "python -c import sagemaker_training.cli.train, sagemaker_pytorch_container.training",
        "python tools/container/base_versions.py",
        "pip install --no-cache-dir --no-deps --require-hashes -r TMP/megatron.txt",
        f"TMP/megatron.txt: megatron-core=={core} --hash=sha256:{default_of('MEGATRON_CORE_SHA256')}",
        "pip install --no-cache-dir --require-hashes -c base-versions.txt -r tools/container/requirements.txt",
        f"base-versions.txt: torch=={TORCH}",
        "base-versions.txt: transformer_engine==2.8.0",
        "base-versions.txt: apex==0.1",
        "base-versions.txt: numpy==1.26.4",
        f"tools/container/requirements.txt: {pinned['requirements.txt']} pins",
        "python tools/container/base_versions.py",
        "pip install --no-cache-dir --no-deps --no-build-isolation .",
        f"python tools/container/self_check.py --efa 1 --megatron-core {core}",
        "REVISION: commit abc123",
    ]


@pytest.mark.root
def test_the_image_finds_the_plugin_first_and_says_what_it_is(full: Build, builder: Builder) -> None:
    config = builder.image()
    environment = dict(line.split("=", 1) for line in config["Env"])
    paths = environment["LD_LIBRARY_PATH"].split(":")
    assert paths[0] == "/opt/amazon/ofi-nccl/lib" and paths[-1] == "/base/lib"
    labels = {name.rpartition("image.")[2]: text for name, text in config["Labels"].items() if "opencontainers" in name}
    assert labels["title"] == "Megatron-ATUM" and labels["licenses"] == "Apache-2.0"
    assert labels["revision"] == "abc123" and labels["base.name"] == "localhost/stub"
    assert config["WorkingDir"] == "/opt/megatron-atum"
    assert config["Entrypoint"] == [ENTRYPOINT], "it makes CUDA run on older drivers"
    assert builder.run("train") == ["nvidia_entrypoint.sh train", "train"], "what SageMaker starts"


@pytest.mark.root
def test_a_build_without_efa_fetches_nothing(builder: Builder) -> None:
    build = builder.build("EFA=0")
    assert build.code == 0, build.output
    assert not [call for call in build.calls if call.startswith(("curl", "apt-get", "efa_installer"))]
    assert not [call for call in build.calls if "sagemaker" in call]
    core = default_of("MEGATRON_CORE")
    assert build.calls[-2:] == [
        f"python tools/container/self_check.py --efa 0 --megatron-core {core}",
        "REVISION: commit unknown",
    ]


@pytest.mark.root
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["EFA=0", CHANGES_TORCH], f"-torch=={TORCH}\n+torch=={OTHER_TORCH}"),
        ([f"EFA_SHA256={'0' * 64}"], f"and not EFA_SHA256={'0' * 64}"),
        (["EFA_SHA256=RIGHT", NO_PLUGIN], "has no plug-in for NCCL"),
    ],
)
def test_what_is_not_as_it_should_be_stops_the_build(builder: Builder, arguments: list[str], said: str) -> None:
    build = builder.build(*(argument.replace("RIGHT", builder.efa_sha256) for argument in arguments))
    assert build.code != 0 and said in build.output, build.output
    assert not [call for call in build.calls if "self_check" in call], "the build went on"


@pytest.mark.root
def test_a_build_without_a_base_says_so(builder: Builder) -> None:
    build = builder.build("EFA=0", base=None)
    assert build.code != 0 and not build.calls
    assert re.search(r'missing \\?"BASE\\?" build argument', build.output), build.output


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("install_efa.sh", ("yes", "1.48.0", "abc", "https://x"), "EFA=yes must be 1 or 0"),
        (
            "install_efa.sh",
            ("1", "1.48.0", "", "https://x"),
            "EFA_SHA256 is empty. Download https://x/aws-efa-installer-1",
        ),
        ("install_sagemaker.sh", ("yes",), "SAGEMAKER=yes must be 1 or 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(script: str, arguments: tuple[str, ...], said: str) -> None:
    command = [shutil.which("sh") or "", str(TOOLS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/"})  # with no program to call
    assert done.returncode == 1 and said in done.stderr, done.stderr


def test_the_build_is_sent_what_it_copies_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().split()
    copied = [
        word for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE.read_text(), re.MULTILINE) for word in line.split()
    ]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == {word.split("/")[0] for word in copied}


# Pins -----------------------------------------------------------------------------------------------------------------


def pins_of(file: Path) -> dict[str, str]:
    """By the name that packages have on the index."""
    found = re.findall(r"^([\w.-]+)==([\w.]+)", file.read_text(), re.MULTILINE)
    pins = {canonicalize_name(name): version for name, version in found}
    assert pins and len(pins) == len(found)
    return pins


def test_the_image_has_pins_with_checksums_for_all_that_setup_py_asks_for() -> None:
    file = TOOLS / "requirements.txt"
    pins = pins_of(file)
    entries = re.split(r"^(?=\S+==)", file.read_text(), flags=re.MULTILINE)[1:]
    assert len(entries) == len(pins)
    assert all(re.fullmatch(r"\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+\n", entry) for entry in entries)
    asked = program(ROOT, "requirements.py", "setup.py", default_of("MEGATRON_CORE")).stdout.splitlines()
    for requirement in map(Requirement, asked):
        if requirement.name != "numpy":
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
    assert not {"torch", "megatron-core", "transformer-engine", "apex", "numpy", "setuptools"} & pins.keys()


def test_the_pins_of_the_image_are_those_of_the_tests() -> None:
    pins, tested = pins_of(TOOLS / "requirements.txt"), pins_of(ROOT / "constraints.txt")
    other = {name for name, version in pins.items() if tested.get(name, version) != version}
    assert not other, "make requirements.txt anew, as it says at its top"


# The programs of the steps --------------------------------------------------------------------------------------------

PACKAGES = {
    "torch": ("torch", "2.9.0a0+nv", 'import os\n__version__ = "2.9.0a0+nv"\n'),
    "transformer_engine": ("transformer_engine", "2.8.0", ""),
    "apex": ("apex", "0.1", ""),
    "numpy": ("numpy", "1.26.4", ""),
    "megatron": ("megatron_core", "0.16.1", ""),
    "megatron_atum": ("megatron_atum", "0.1.0", ""),
    "transformers": ("transformers", "5.20.0", ""),
    "webdataset": ("webdataset", "1.0.2", ""),
}
ASKS = ["torch>=2.6", "megatron-core==0.16.1", "transformers<6,>=5.20", 'webdataset>=1; extra == "data"']
ASKS += ['no-such-package; extra == "dev"']


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages that come before those of this environment."""
    site = tmp_path / "site"
    for module, (package, version, code) in PACKAGES.items():
        (site / module).mkdir(parents=True)
        (site / module / "__init__.py").write_text(code)
        asks = "".join(f"Requires-Dist: {line}\n" for line in ASKS) if module == "megatron_atum" else ""
        info = site / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n{asks}")
    for module in ("megatron/core/__init__.py", "transformer_engine/pytorch.py", "megatron_atum/training/run.py"):
        (site / module).parent.mkdir(exist_ok=True)
        (site / module).write_text("")
    return site


def program(site: Path, name: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(site), **environment}
    )


def change_version(site: Path, package: str, version: str) -> None:
    (info,) = site.glob(f"{package}-*.dist-info")
    metadata = info / "METADATA"
    metadata.write_text(re.sub(r"^Version: .*$", f"Version: {version}", metadata.read_text(), flags=re.MULTILINE))
    info.rename(site / f"{package}-{version}.dist-info")


def test_base_versions_are_constraints_for_pip(site: Path) -> None:
    done = program(site, "base_versions.py")
    assert done.stdout == "torch==2.9.0a0+nv\ntransformer_engine==2.8.0\napex==0.1\nnumpy==1.26.4\n"
    shutil.rmtree(next(site.glob("apex-*")))
    done = program(site, "base_versions.py")
    assert done.returncode == 1 and "no apex" in done.stderr and not done.stdout


def test_requirements_are_those_of_setup_py_beside_torch_and_megatron_core() -> None:
    done = program(ROOT, "requirements.py", "setup.py", default_of("MEGATRON_CORE"))
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert {"transformers>=5.20,<6", "s3fs>=2024.2", "wandb>=0.17"} <= set(lines) and len(set(lines)) == len(lines)
    assert not [line for line in lines if re.match(r"(torch|megatron-core|pytest|apex)\b", line)]
    done = program(ROOT, "requirements.py", "setup.py", "0.15.0")
    assert done.returncode == 1 and "MEGATRON_CORE is 0.15.0" in done.stderr


@pytest.fixture
def image(site: Path, tmp_path: Path) -> list[str | Path]:
    """Arguments of self_check.py for an image in order. LD_LIBRARY_PATH is tmp_path/lib."""
    (tmp_path / "held").write_text("torch==2.9.0a0+nv\ntransformer_engine==2.8.0\napex==0.1\nnumpy==1.26.4\n")
    bin, lib = tmp_path / "amazon" / "efa" / "bin", tmp_path / "amazon" / "ofi-nccl" / "lib"
    bin.mkdir(parents=True)
    lib.mkdir(parents=True)
    (lib / "libnccl-net-ofi.so").touch()
    (lib / "libnccl-net.so").symlink_to("libnccl-net-ofi.so")
    (bin / "fi_info").write_text("#!/bin/sh\n")
    (bin / "fi_info").chmod(0o755)
    prefix = ["--held", tmp_path / "held", "--efa-prefix", tmp_path / "amazon"]
    return ["--efa", "1", "--megatron-core", "0.16.1", *prefix]


def checked(site: Path, image: list[str | Path], *search: Path) -> subprocess.CompletedProcess[str]:
    paths = search or (site.parent / "amazon" / "ofi-nccl" / "lib",)
    return program(site, "self_check.py", *image, LD_LIBRARY_PATH=":".join(map(str, paths)))


def test_an_image_in_order_passes(site: Path, image: list[str | Path]) -> None:
    done = checked(site, image)
    assert done.returncode == 0, done.stderr
    assert "torch 2.9.0a0+nv" in done.stdout and "the image is complete" in done.stdout


@pytest.mark.parametrize(
    ("package", "version", "said"),
    [
        ("torch", "2.10.0", "torch was 2.9.0a0+nv in the base image and is 2.10.0"),
        ("apex", "0.2", "apex was 0.1 in the base image and is 0.2"),
        ("megatron_core", "0.17.0", "megatron-core is 0.17.0, not 0.16.1"),
        ("numpy", "2.4.6", "numpy was 1.26.4 in the base image and is 2.4.6"),
        ("transformers", "4.50.0", "and the image has 4.50.0"),
        ("webdataset", "0.2.100", "and the image has 0.2.100"),
    ],
)
def test_a_version_that_is_another_is_named(
    site: Path, image: list[str | Path], package: str, version: str, said: str
) -> None:
    change_version(site, package, version)
    done = checked(site, image)
    assert done.returncode == 1 and said in done.stderr, done.stderr


@pytest.mark.parametrize("module", ["transformer_engine", "transformer_engine.pytorch", "megatron_atum.training.run"])
def test_an_import_that_fails_is_named(site: Path, image: list[str | Path], module: str) -> None:
    path = site.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    file.write_text("raise OSError('libtransformer_engine.so: undefined symbol')")
    done = checked(site, image)
    assert done.returncode == 1 and f"{module} cannot be imported: OSError" in done.stderr


def test_what_a_requirement_asks_for_must_be_there(site: Path, image: list[str | Path]) -> None:
    (info,) = site.glob("transformers-*.dist-info")
    with (info / "METADATA").open("a") as file:
        file.write("Requires-Dist: numpy>=2\n")
    done = checked(site, image)
    assert done.returncode == 1 and "transformers asks for numpy>=2, and the image has 1.26.4" in done.stderr


def test_the_plugin_must_be_efas(site: Path, image: list[str | Path], tmp_path: Path) -> None:
    other, ours = tmp_path / "hpcx", tmp_path / "amazon" / "ofi-nccl" / "lib"
    other.mkdir()
    done = checked(site, image, other)
    assert done.returncode == 1 and "NCCL would use TCP" in done.stderr
    (other / "libnccl-net.so").touch()
    assert "which is not EFA's" in checked(site, image, other, ours).stderr
    assert checked(site, image, ours, other).returncode == 0
    (tmp_path / "amazon" / "efa" / "bin" / "fi_info").unlink()
    assert "does not run" in checked(site, image).stderr
    image[1] = "0"
    assert checked(site, image, other).returncode == 0, "an image without EFA has none to check"
