#!/usr/bin/env bash
# Creates the environment in .venv and installs the package with its development tools.
#
#   ./setup_env.sh            CPU
#   ./setup_env.sh --gpu      a torch with CUDA (also: FLASHNORM_GPU=1)
#   source setup_env.sh       the same, and activates the environment
#
# Running it again does nothing unless the requirements changed. Settings of pip (index, wheel
# folders, certificates) are honoured for uv too. PYTHON chooses the interpreter.

_flashnorm_script="${BASH_SOURCE[0]}"

if [[ "$_flashnorm_script" != "$0" ]]; then
    # Sourced: the work runs in a shell of its own, whose failure leaves this one as it is.
    if bash "$_flashnorm_script" "$@"; then
        # shellcheck disable=SC1091
        source "$(dirname "$_flashnorm_script")/.venv/bin/activate"
        unset _flashnorm_script
        return 0
    fi
    unset _flashnorm_script
    return 1
fi

set -euo pipefail

main() {
    cd "$(dirname "$_flashnorm_script")"
    parse_arguments "$@"
    find_python
    if up_to_date; then
        say "the environment in $VENV is up to date"
        return
    fi
    rm -f "$STAMP"
    create_environment
    forward_pip_settings
    write_constraints
    install_package
    check_environment
    fingerprint > "$STAMP"
    say "done; activate with: source $VENV/bin/activate"
}

readonly VENV=.venv
readonly STAMP="$VENV/.flashnorm-stamp"
readonly EXTRAS=dev
readonly MINIMUM_PYTHON="3, 11"

say() { printf 'setup_env: %s\n' "$*"; }

fail() {
    printf 'setup_env: error: %s\n' "$*" >&2
    exit 1
}

parse_arguments() {
    GPU="${FLASHNORM_GPU:-0}"
    while (($#)); do
        case "$1" in
            --gpu) GPU=1 ;;
            --cpu) GPU=0 ;;
            -h | --help)
                sed -n '2,9s/^# \{0,1\}//p' "$0"
                exit 0
                ;;
            *) fail "unknown argument $1; expected --cpu or --gpu" ;;
        esac
        shift
    done
    [[ "$GPU" == 0 || "$GPU" == 1 ]] || fail "FLASHNORM_GPU is '$GPU'; expected 0 or 1"
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c "import sys; sys.exit(sys.version_info < ($MINIMUM_PYTHON))" 2>/dev/null; then
            PYTHON="$(command -v "$candidate")"
            return
        fi
        [[ "$candidate" != "${PYTHON:-}" ]] || fail "PYTHON=$PYTHON is not Python ${MINIMUM_PYTHON/, /.} or later"
    done
    fail "no Python ${MINIMUM_PYTHON/, /.} or later found; install one, or set PYTHON to its path"
}

fingerprint() {
    printf 'gpu=%s python=%s\n' "$GPU" "$("$PYTHON" -c 'import sys; print(sys.version_info[:3])')"
    cat pyproject.toml setup.py constraints.txt setup_env.sh
}

up_to_date() {
    [[ -f "$STAMP" ]] && "$VENV/bin/python" -c "import importlib.metadata as m; m.version('flashnorm-compile')" 2>/dev/null &&
        fingerprint | cmp --silent - "$STAMP"
}

create_environment() {
    if ! "$VENV/bin/python" -c "import sys; sys.exit(sys.version_info < ($MINIMUM_PYTHON))" 2>/dev/null; then
        say "creating $VENV with $("$PYTHON" --version)"
        rm -rf "$VENV"
        "$PYTHON" -m venv "$VENV" ||
            fail "python -m venv failed; on Debian and Ubuntu, install the package python3-venv"
    fi
    UV="$(command -v uv || true)"
    if [[ -z "$UV" ]]; then
        if "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check uv; then
            UV="$VENV/bin/uv"
        else
            say "uv cannot be installed; pip does the work instead"
        fi
    fi
}

# uv does not read pip's configuration: where packages come from is handed on.
forward_pip_settings() {
    local links index extra certificates
    links="$(pip_setting find-links)"
    index="$(pip_setting index-url)"
    extra="$(pip_setting extra-index-url)"
    [[ -z "$links" || -n "${UV_FIND_LINKS:-}" ]] || export UV_FIND_LINKS="${links// /,}"
    [[ -z "$index" || -n "${UV_DEFAULT_INDEX:-}" ]] || export UV_DEFAULT_INDEX="$index"
    if [[ -n "$extra" && -z "${UV_INDEX:-}" ]]; then
        # As pip does: the best version from all indexes, not the first index that has the name.
        export UV_INDEX="$extra" UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}"
    fi
    certificates="$(pip_setting cert)"
    [[ -z "$certificates" || -n "${SSL_CERT_FILE:-}" ]] || export SSL_CERT_FILE="$certificates"
}

# Prints a setting of pip in one line: from the environment, else from its configuration files.
pip_setting() {
    local variable="PIP_${1^^}" section value
    variable="${variable//-/_}"
    value="${!variable:-}"
    for section in install global; do
        [[ -n "$value" ]] || value="$("$VENV/bin/python" -m pip config get "$section.$1" 2>/dev/null || true)"
    done
    printf '%s' "$value" | tr -s '\n\t ' ' '
}

write_constraints() {
    CONSTRAINTS="$VENV/constraints.txt"
    if [[ "$GPU" == 1 ]]; then
        # torch and the triton that belongs to it follow the machine's CUDA.
        grep -v -i -E '^(torch|triton)==' constraints.txt > "$CONSTRAINTS"
    else
        cp constraints.txt "$CONSTRAINTS"
    fi
}

install_package() {
    local target=(--editable ".[$EXTRAS]" --constraint "$CONSTRAINTS")
    say "installing the package and its development tools"
    if [[ -n "$UV" ]]; then
        if install_with_uv "${target[@]}"; then
            return
        fi
        say "uv failed; trying again with pip"
    fi
    "$VENV/bin/python" -m pip install --disable-pip-version-check "${target[@]}" ||
        fail "the installation failed; see the messages above"
}

install_with_uv() {
    local command=("$UV" pip install --python "$VENV/bin/python" "$@")
    # Wheels that the environment provides come first; else uv picks torch for CPU or the GPU.
    if [[ -z "${UV_FIND_LINKS:-}" && -z "${UV_TORCH_BACKEND:-}" ]]; then
        local backend=cpu
        [[ "$GPU" == 0 ]] || backend=auto
        "${command[@]}" --torch-backend "$backend" && return
        say "no torch build for '$backend' could be had from its own index; trying the default one"
    fi
    "${command[@]}"
}

check_environment() {
    "$VENV/bin/python" - "$GPU" << 'PYTHON' || fail "the environment is not complete"
import sys

import torch

import flashnorm_compile
from flashnorm_compile import cli

wants_gpu = sys.argv[1] == "1"
print(f"setup_env: torch {torch.__version__}, flashnorm-compile ready")
if wants_gpu and torch.version.cuda is None:
    sys.exit("setup_env: error: --gpu was asked for, but the torch installed has no CUDA")
if wants_gpu and not torch.cuda.is_available():
    print("setup_env: note: torch has CUDA, but this machine shows no CUDA device")
PYTHON
}

main "$@"
