#!/usr/bin/env bash
# The main job on real input: export MiniLM with its real weights, prove it, package it, serve it with a real Triton,
# and ask it about three sentences. Installs what it needs first.
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

kpdeploy export minilm --target triton --repo models/

ready=$(mktemp)
kpdeploy serve models/ --http-port 0 --grpc-port 0 --metrics-port 0 --json >"$ready" &
server=$!
trap 'kill "$server" 2>/dev/null && wait "$server" || true; rm -f "$ready"' EXIT
# The one JSON object on its stdout says that a golden request came back right, and where; or why none did.
until [ -s "$ready" ] || ! kill -0 "$server" 2>/dev/null; do sleep 0.5; done
url=$(python -c 'import json, sys; print(json.load(sys.stdin)["grpc"])' <"$ready" 2>/dev/null) || {
    cat "$ready" >&2
    exit 1
}

kpdeploy verify models/ --url "$url"
python examples/ask.py "$url"
