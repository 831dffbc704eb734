#!/usr/bin/env bash
# Serve tiny_onnx v1 in NVIDIA's container:  bash launch.sh [more options of tritonserver]
# Written by kpdeploy. What it reads of the environment:
#   TRITON_IMAGE  another image; `kpdeploy doctor REPO --container TAG` says what would load in it
#   REPO          the repository, where it is not two folders above this file
#   HTTP_PORT, GRPC_PORT, METRICS_PORT   on 127.0.0.1, in place of 8000, 8001 and 8002
#   DOCKER        what runs containers, in place of docker
# The server loads this model; --load-model=NAME adds another one of the repository.
set -euo pipefail

image=${TRITON_IMAGE:-nvcr.io/nvidia/tritonserver:26.08-py3}
repo=${REPO:-"$(dirname -- "${BASH_SOURCE[0]}")/../.."}
repo=$(cd -- "$repo" && pwd)
model=tiny_onnx
mount=/models

# The server reads the version from config.pbtxt; the options below are those of this one.
if ! grep -Eqs 'versions: *\[? *1( |\]|$)' "$repo/$model/config.pbtxt"; then
    echo "$repo/$model/config.pbtxt does not name version 1: run the launch.sh of the version it names" >&2
    exit 1
fi

options=(
    --rm
    --publish "127.0.0.1:${HTTP_PORT:-8000}:8000"
    --publish "127.0.0.1:${GRPC_PORT:-8001}:8001"
    --publish "127.0.0.1:${METRICS_PORT:-8002}:8002"
    --mount "type=bind,source=$repo,target=$mount,readonly"
)
server=(tritonserver)
server+=("--model-repository=$mount" --model-control-mode=explicit "--load-model=$model")
exec "${DOCKER:-docker}" run "${options[@]}" "$image" "${server[@]}" "$@"
