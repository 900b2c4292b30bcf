#!/bin/sh
# Installs what setup.py asks for into an image, and leaves torch, Transformer Engine and apex as they are. A step of the
# Dockerfile, run in the folder of setup.py.
#
#   install_requirements.sh MEGATRON_CORE SHA256        version of megatron-core, and the checksum of its wheel
#
# base-versions.txt stays: the versions that the image must keep.
set -eu
version=$1 sha256=$2
tools=$(dirname "$0")
folder=$(mktemp -d)

python "$tools/base_versions.py" >base-versions.txt
python "$tools/requirements.py" setup.py "$version" >"$folder/requirements.txt"
echo "megatron-core==$version --hash=sha256:$sha256" >"$folder/megatron.txt"
pip install --no-cache-dir --no-deps --require-hashes -r "$folder/megatron.txt"
pip install --no-cache-dir -c base-versions.txt -r "$folder/requirements.txt"
python "$tools/base_versions.py" >"$folder/after.txt"
cmp base-versions.txt "$folder/after.txt" || {
    echo "install_requirements: the installation changed what the base brings:" >&2
    diff base-versions.txt "$folder/after.txt" >&2
    exit 1
}
rm -rf "$folder"
