#!/usr/bin/env bash
# Write triton_models/ anew: one tiny model in each format that runs on any CPU. Held as golden files; a test compares
# what the tool writes today with them, and serves them. Without fused ops: whether those are faster is another answer
# on another machine.
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

rm -rf triton_models/tiny_*
for format in onnx openvino torchscript; do
    (cd examples && kpdeploy export tiny:classifier --repo ../triton_models --format "$format" --name "tiny_$format" \
        --fuse never --input "ids:int64[batch=1..8,seq=1..32]" --input "mask:int64[batch,seq]{mask}")
done
