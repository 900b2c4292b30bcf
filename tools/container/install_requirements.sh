#!/bin/sh
# Installs what setup.py asks for into an image, as requirements.txt pins it, and leaves torch, Transformer Engine, apex
# and numpy as they are. A step of the Dockerfile.
#
#   install_requirements.sh MEGATRON_CORE SHA256        version of megatron-core, and the checksum of its wheel
#
# base-versions.txt stays: the versions that the image must keep.
set -eu
version=$1 sha256=$2
tools=$(dirname "$0")
folder=$(mktemp -d)
# The base's constraints (PIP_CONSTRAINT) hold its packages at versions that setup.py may not allow.
unset PIP_CONSTRAINT

python "$tools/base_versions.py" >base-versions.txt
echo "megatron-core==$version --hash=sha256:$sha256" >"$folder/megatron.txt"
pip install --no-cache-dir --no-deps --require-hashes -r "$folder/megatron.txt"
# With dependencies, which must all be there or in the file: numpy of the base has to fit, or pip refuses.
pip install --no-cache-dir --require-hashes -c base-versions.txt -r "$tools/requirements.txt"
python "$tools/base_versions.py" >"$folder/after.txt"
cmp base-versions.txt "$folder/after.txt" || {
    echo "install_requirements: the installation changed what the base brings:" >&2
    diff base-versions.txt "$folder/after.txt" >&2
    exit 1
}
rm -rf "$folder"
