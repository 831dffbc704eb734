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
pytest --durations=15 "$@"
