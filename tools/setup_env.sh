#!/usr/bin/env bash
# Makes .venv with the packages pinned in constraints.txt, or does nothing when it is up to date.
#
#   bash tools/setup_env.sh            PYTHON=/path/to/python3.11 chooses the interpreter
#
# .venv/atum-stamp holds a hash of everything the environment depends on; it is written last. Without it, or with
# another hash, the packages are installed again; a .venv in which an installation was cut short is made anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/atum-stamp
log() { echo "setup: $*" >&2; }
die() { log "$*"; exit 1; }

want() { { pwd; cat setup.py constraints.txt tools/setup_env.sh; } | sha256sum | cut -d' ' -f1; }
up_to_date() { [ -x $venv/bin/python ] && [ "$(cat $stamp 2>/dev/null)" = "$(want)" ] && $venv/bin/python -c ""; }

suitable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        suitable "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.11 or 3.12"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.11 python3.12; do
        if suitable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "Python 3.11 or 3.12 is needed; tried python3, python3.11 and python3.12." \
        "Install one (Debian: apt-get install python3.11), or set PYTHON=/path/to/python"
}

has_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

ensure_venv_module() {
    has_venv "$1" && return
    local package
    package=$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        log "$1 has no venv module: installing $package"
        retry apt-get update -qq
        retry env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package"
    fi
    has_venv "$1" || die "$1 has no venv module. As root: apt-get install $package"
}

# Networks fail; three attempts, then the last error stands.
retry() {
    local attempt
    for attempt in 1 2 3; do
        "$@" && return
        [ $attempt = 3 ] || { log "attempt $attempt failed, trying again: $*"; sleep $((attempt * 5)); }
    done
    die "gave up after 3 attempts: $*"
}

# True if .venv can be completed in place: it lies where it was made, its Python and pip run, and no package in it
# was cut off in the middle (pip writes RECORD last, and moves what it removes to a name that starts with ~).
sound() {
    [ -x $venv/bin/python ] && suitable $venv/bin/python && $venv/bin/python - "$PWD/$venv" <<'PYTHON' >/dev/null 2>&1
import pathlib, sys, sysconfig
import pip
site = pathlib.Path(sysconfig.get_path("purelib"))
whole = all((info / "RECORD").exists() for info in site.glob("*.dist-info"))
pip_script = (pathlib.Path(sys.argv[1]) / "bin" / "pip").read_text()
sys.exit(not (whole and not list(site.glob("~*")) and sys.argv[1] in pip_script))
PYTHON
}

install() {
    retry $venv/bin/python -m pip install --disable-pip-version-check --quiet --progress-bar off -c constraints.txt "$@"
}

up_to_date && exit 0
[ ! -L $venv ] || die "$venv is a link to $(readlink -f $venv), which an installation would empty; remove the link"
exec 9<tools/setup_env.sh # two `make` at once: the second waits here, then finds the work done
flock 9
up_to_date && exit 0

started=$SECONDS
rm -f $stamp
if sound; then
    log "completing $venv"
else
    python=$(find_python)
    ensure_venv_module "$python"
    log "making $venv with $("$python" --version), $(command -v "$python")"
    "$python" -m venv --clear $venv
fi
# torch first and alone: with no torch installed, another package's range could choose one that brings CUDA along.
log "torch"
install "$(grep -E '^torch==' constraints.txt)"
log "everything else in setup.py"
install "$(grep -E '^setuptools==' constraints.txt)"
install --no-build-isolation --editable '.[data,demo,logging,dev]'
$venv/bin/python -m pip check
want >$stamp
log "$venv is ready after $((SECONDS - started)) s"
