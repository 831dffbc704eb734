#!/usr/bin/env bash
# The quality gates and all tests, on a clean clone as well: installs what it needs first.
# Arguments go to pytest: ./scripts/test.sh tests/unit -k signature
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
mypy
# One worker a core, each file's tests in one of them: most tests wait for an import or a server. OpenMP's threads sleep
# while they wait, for they share those cores.
export OMP_WAIT_POLICY=passive
[ $# -gt 0 ] || set -- -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
pytest --durations=15 "$@"
