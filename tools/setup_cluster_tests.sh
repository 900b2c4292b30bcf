#!/usr/bin/env bash
# Installs what the tests of tests/launch use of Debian's packages: a real Slurm, and buildah for the image.
#
#   bash tools/setup_cluster_tests.sh
#
# Does nothing where all is there. As root on Debian or Ubuntu it installs what is missing, without starting a daemon and
# without removing a package. Elsewhere, and where that fails, it says what is missing; the tests that need it are skipped
# and say so too. For other users than root it does nothing. The exit code is 0 in any case.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 0

programs=(slurmctld slurmd srun munged ip buildah busybox)
packages=(slurmctld slurmd slurm-client slurm-wlm munge iproute2 buildah busybox-static)
policy=${POLICY_RC_D:-/usr/sbin/policy-rc.d} # Debian asks it whether the daemons of a package may be started
log() { echo "setup: $*" >&2; }

missing() {
    local program
    for program in "${programs[@]}"; do
        command -v "$program" >/dev/null || printf '%s ' "$program"
    done
}

forbid_daemons() {
    [ -e "$policy" ] && return
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' INT TERM HUP
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
}

apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=2 "$@" >"$output" 2>&1
}

install() {
    output=$(mktemp)
    forbid_daemons
    if ! { apt update && apt install -y --no-install-recommends --no-remove "${packages[@]}"; }; then
        log "apt-get failed:"
        tail -n 5 "$output" >&2
    fi
    rm -f "$output"
}

if [ "$(id -u)" != 0 ]; then
    log "cluster tests that need root will be skipped: this is user $(id -u)"
    exit 0
fi
[ -z "$(missing)" ] && exit 0
if command -v apt-get >/dev/null; then
    exec 9<tools/setup_cluster_tests.sh # two `make` at once: the second waits here, then finds the work done
    flock 9
    if [ -n "$(missing)" ]; then
        log "installing Debian's packages for the cluster tests: ${packages[*]}"
        install
    fi
fi
left=$(missing)
[ -z "$left" ] || log "cluster tests that need these programs will be skipped: $left(Debian: apt-get install ${packages[*]})"
exit 0
