"""Builds the Dockerfile with buildah on a stub of its base image, so that every RUN line is executed.

The stub has busybox for a shell. pip, python, apt-get and curl are scripts that say how they were called, and do what
the steps after them need; so is the EFA installer, which the stub's curl "downloads". As in NVIDIA's images the
entrypoint runs its arguments, and pip is constrained. Nothing leaves this machine.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BASE = "localhost/stub"
TORCH, OTHER_TORCH = "2.9.0a0+stub", "2.9.1"
ENTRYPOINT = "/opt/nvidia/nvidia_entrypoint.sh"
CALL = "stub: "

# What a build argument asks of the stubs:
CHANGES_TORCH = "MEGATRON_CORE_SHA256=changes-torch"
NO_PLUGIN = "EFA_URL=https://no-plugin"

STUBS = {
    "usr/local/bin/apt-get": "",
    "usr/local/bin/curl": """case "$*" in *no-plugin*) touch /stub/no-plugin ;; esac
while [ "$1" != -o ]; do shift; done; cp /stub/efa.tar.gz "$2\"""",
    "usr/local/bin/ldconfig": "",
    ENTRYPOINT[1:]: 'exec "$@"',
    "usr/local/bin/pip": f"""for word; do case $word in
tools/*.txt) echo "{CALL}$word: $(grep -c "^[^#]*==" "$word") pins" >&2 ;;
*.txt) sed "s|^|{CALL}$word: |" "$word" >&2 ;;
esac; done
case "$*" in *-r*) [ -z "$PIP_CONSTRAINT" ] || echo "{CALL}PIP_CONSTRAINT=$PIP_CONSTRAINT" >&2 ;; esac
case "$*" in --python*) cp /stub/train /opt/sagemaker/bin ;; esac
if [ "${{6:-x}}" != x ] && grep -q changes-torch "$6"; then
    sed -i 's/^torch==.*/torch=={OTHER_TORCH}/' /stub/versions
fi""",
    "usr/local/bin/python": f"""case $1 in
*/base_versions.py) cat /stub/versions ;;
-m) mkdir -p "$4/bin" && cp "$0" "$4/bin" ;;
*/self_check.py)
    grep -qx 'torch=={TORCH}' base-versions.txt && [ -e pretrain_atum.py ] && [ -e tools/plan.py ] || exit 1
    echo "{CALL}REVISION: $(cat megatron_atum/REVISION)" >&2 ;;
esac""",
    "stub/train": "",
    "efa/efa_installer.sh": """mkdir -p /opt/amazon/ofi-nccl/lib
[ -e /stub/no-plugin ] || touch /opt/amazon/ofi-nccl/lib/libnccl-net-ofi.so""",
}


def stub_script(name: str, body: str) -> str:
    return f'#!/bin/sh\necho "{CALL}{Path(name).name} $*" >&2\n{body}\n'


@dataclass(frozen=True)
class Build:
    """How a build ended."""

    code: int
    output: str
    calls: list[str]  # of the stubs, in their order

    @property
    def steps(self) -> list[str]:
        return re.findall(r"^STEP \d+/\d+: (.*)", self.output, re.MULTILINE)


@dataclass
class Builder:
    """Images live below `folder` and nowhere else."""

    folder: Path
    efa_sha256: str = ""

    def make_stub(self) -> None:
        """The base image."""
        root = self.folder / "stub" / "root"
        for folder in ("bin", "tmp", "stub", "usr/local/bin"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        busybox = shutil.which("busybox")
        assert busybox is not None
        shutil.copy(busybox, root / "bin" / "busybox")
        listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout
        for applet in listed.split():
            if applet != "busybox":
                (root / "bin" / applet).symlink_to("busybox")
        for name, body in STUBS.items():
            path = self.folder / name if name.startswith("efa/") else root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(stub_script(name, body))
            path.chmod(0o755)
        (root / "stub" / "versions").write_text(
            f"torch=={TORCH}\ntransformer_engine==2.8.0\napex==0.1\nnumpy==1.26.4\n"
        )
        archive = root / "stub" / "efa.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(self.folder / "efa", "aws-efa-installer")
        self.efa_sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
        file = self.folder / "stub" / "Dockerfile"
        variables = "PATH=/usr/local/bin:/bin LD_LIBRARY_PATH=/base/lib PIP_CONSTRAINT=/etc/pip/constraint.txt"
        file.write_text(f'FROM scratch\nCOPY root/ /\nENV {variables}\nENTRYPOINT ["{ENTRYPOINT}"]\n')
        done = self._bud(file, file.parent, BASE)
        assert done.returncode == 0, done.stdout + done.stderr

    def build(self, *arguments: str, base: str | None = BASE) -> Build:
        """The Dockerfile with these build arguments (NAME=value) as image `atum`."""
        arguments = (*arguments, *((f"BASE={base}",) if base else ()))
        options = [part for argument in arguments for part in ("--build-arg", argument)]
        done = self._bud(ROOT / "Dockerfile", ROOT, "atum", *options)
        output = done.stdout + done.stderr
        calls = [re.sub(r"/tmp/[\w.]+", "TMP", line[len(CALL) :]) for line in output.splitlines() if CALL in line[:6]]
        return Build(done.returncode, output, [call.rstrip() for call in calls])

    def image(self) -> dict[str, Any]:
        """The configuration of the image `atum`."""
        done = self._buildah("inspect", "--type", "image", "localhost/atum")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout)["OCIv1"]["config"])

    def run(self, *arguments: str) -> list[str]:
        """A container of the image `atum`, started with these arguments. Returns the calls of the stubs."""
        done = self._buildah("from", "--name", "atum-run", "--pull-never", "localhost/atum")
        assert done.returncode == 0, done.stderr
        try:
            command = [*self.image()["Entrypoint"], *arguments]  # buildah itself leaves the entrypoint out
            done = self._buildah("run", "--isolation", "chroot", "atum-run", "--", *command)
            assert done.returncode == 0, done.stderr
        finally:
            self._buildah("rm", "atum-run")
        return [line[len(CALL) :].rstrip() for line in (done.stdout + done.stderr).splitlines() if CALL in line[:6]]

    def _bud(self, file: Path, context: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        policy = self.folder / "policy.json"
        policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        quiet = ("--isolation", "chroot", "--pull-never", "--signature-policy", str(policy))
        return self._buildah("bud", *quiet, *options, "-f", str(file), "-t", name, str(context))

    def _buildah(self, *command: str) -> subprocess.CompletedProcess[str]:
        storage = ["--storage-driver", "vfs", "--root", str(self.folder / "images")]
        storage += ["--runroot", str(self.folder / "run")]
        return subprocess.run(["buildah", *storage, *command], capture_output=True, text=True, timeout=120)
