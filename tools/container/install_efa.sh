#!/bin/sh
# Installs AWS's EFA software, libfabric and NCCL's plug-in for it, into an image. A step of the Dockerfile.
#
#   install_efa.sh WANTED VERSION SHA256 URL        WANTED: 1, or 0 to do nothing; URL: the folder of the installer
set -eu
wanted=$1 version=$2 sha256=$3 url=$4
archive=aws-efa-installer-$version.tar.gz

die() { echo "install_efa: $*" >&2; exit 1; }

case $wanted in
0) echo "install_efa: EFA=0, so this image is not for AWS's network"; exit 0 ;;
1) ;;
*) die "EFA=$wanted must be 1 or 0" ;;
esac
[ -n "$sha256" ] || die "EFA_SHA256 is empty. Download $url/$archive, check its signature as AWS's EFA guide says, and pass" \
    "what sha256sum prints: --build-arg EFA_SHA256=...; or leave EFA out: --build-arg EFA=0"

folder=$(mktemp -d)
curl -fsSL --retry 3 -o "$folder/$archive" "$url/$archive"
found=$(sha256sum "$folder/$archive" | cut -d' ' -f1)
[ "$found" = "$sha256" ] || die "$url/$archive has SHA-256 $found, and not EFA_SHA256=$sha256"
tar -xzf "$folder/$archive" -C "$folder"
apt-get update
# -y: no questions. The kernel's part and its limits belong to the host; there is no device to try here.
(cd "$folder/aws-efa-installer" && ./efa_installer.sh -y --skip-kmod --skip-limit-conf --no-verify)
rm -rf "$folder" /var/lib/apt/lists/*

# NCCL asks for libnccl-net.so. Some versions of the installer call it libnccl-net-ofi.so in NVIDIA's images.
plugin=$(find /opt/amazon/ofi-nccl -name 'libnccl-net*.so' | sort | head -n 1)
[ -n "$plugin" ] || die "EFA $version has no plug-in for NCCL (libnccl-net*.so in /opt/amazon/ofi-nccl); take 1.47 or newer"
name=$(dirname "$plugin")/libnccl-net.so
[ -e "$name" ] || ln -s "$(basename "$plugin")" "$name"
ldconfig
