#!/usr/bin/env bash
# All that is measured on an H100, in one go: the kernels are built, checked and timed, whole models, and what serves them.
#
#     ./benchmarks/h100.sh [FOLDER FOR THE JSON FILES, default: benchmarks/results]
#
# Needs an H100, nvcc, a torch for CUDA, and the packages of this project (PYTHON says which interpreter has them);
# ONNX Runtime's part is left out, and told, where onnxruntime has no CUDA provider. About an hour, most of it
# torch.compile's. A part that fails does not keep the others from running; the exit code is how many did.
set -uo pipefail
cd "$(dirname "$0")/.."
results=$(realpath -m "${1:-benchmarks/results}")
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$results"
failed=()

part() {
    echo "== $*"
    "$@" || failed+=("$*")
}

bench() {
    part "$python" "benchmarks/$1.py" --json "$results/$2_h100.json" "${@:3}"
}

served() {
    "$python" -m kpdeploy export gpu_models:Bert --format cuda --level 2 --accuracy-budget 2e-2 --name bert \
        --repo "$work/models" --input 'input_ids:int64[batch=1..8,seq=1..128]{0..30521}' \
        --input 'attention_mask:int64[batch,seq]{mask}' &&
        "$python" benchmarks/served_gpu.py "$work/models" bert -o "$results/served_gpu_h100.json"
}

part "$python" setup.py build_ext --inplace
part "$python" -m pytest -q tests/kernels/test_cuda.py
bench cuda_kernels cuda_kernels --sanitize
bench hopper_attention hopper_attention --sanitize
bench hopper_fp8_attention hopper_fp8_attention
bench rotary_embedding rotary_embedding
bench attention_fp8 attention_fp8
bench hopper_linear hopper_linear
bench gpu_models gpu_models
bench gpu_memory gpu_memory
part served
if "$python" -c 'import onnxruntime as o, sys; sys.exit("CUDAExecutionProvider" not in o.get_available_providers())'; then
    part "$python" benchmarks/gpu_onnx.py write "$work/onnx"
    part "$python" benchmarks/gpu_onnx.py run "$work/onnx" --json "$results/gpu_onnx_h100.json"
else
    echo "NOT RUN: gpu_onnx.py: this onnxruntime has no CUDA provider (pip install onnxruntime-gpu)"
fi

printf 'failed: %s\n' "${failed[@]:-nothing}"
exit "${#failed[@]}"
