"""The fused ops: one file an op, one row in OPS, one name everywhere.

kpdeploy/ops/<name>.py   schema, float64 reference, fake kernel
csrc/core/               its kernels, behind the C ABI
torch.ops.kpdeploy.<name>, com.kpdeploy:<Name> in ONNX, kpdeploy._core.<name> on NumPy arrays

`register()` makes them callable in torch: from libkpdeploy_torch.so where it is, else as their references, so that
torch.export works on any machine. Importing this costs nothing; torch is imported when it is needed.
"""

from __future__ import annotations

from kpdeploy.ops.add_layer_norm import ADD_LAYER_NORM
from kpdeploy.ops.add_layer_norm_fp8 import ADD_LAYER_NORM_FP8
from kpdeploy.ops.add_rms_norm import ADD_RMS_NORM
from kpdeploy.ops.add_rms_norm_fp8 import ADD_RMS_NORM_FP8
from kpdeploy.ops.attention import ATTENTION
from kpdeploy.ops.attention_add_layer_norm import ATTENTION_ADD_LAYER_NORM
from kpdeploy.ops.attention_fp8 import ATTENTION_FP8
from kpdeploy.ops.fp8_add_layer_norm import FP8_ADD_LAYER_NORM
from kpdeploy.ops.fp8_add_rms_norm import FP8_ADD_RMS_NORM
from kpdeploy.ops.fp8_attention import FP8_ATTENTION
from kpdeploy.ops.fp8_attention_add_layer_norm import FP8_ATTENTION_ADD_LAYER_NORM
from kpdeploy.ops.fp8_attention_operands import FP8_ATTENTION_OPERANDS
from kpdeploy.ops.fp8_gated_linear import FP8_GATED_LINEAR
from kpdeploy.ops.fp8_layer_norm import FP8_LAYER_NORM
from kpdeploy.ops.fp8_linear_activation import FP8_LINEAR_ACTIVATION
from kpdeploy.ops.fp8_linear_add import FP8_LINEAR_ADD
from kpdeploy.ops.fp8_quantize import FP8_QUANTIZE
from kpdeploy.ops.fp8_rms_norm import FP8_RMS_NORM
from kpdeploy.ops.gated_linear import GATED_LINEAR
from kpdeploy.ops.layer_norm import LAYER_NORM
from kpdeploy.ops.layer_norm_fp8 import LAYER_NORM_FP8
from kpdeploy.ops.linear_activation import LINEAR_ACTIVATION
from kpdeploy.ops.linear_add import LINEAR_ADD
from kpdeploy.ops.op import NAMESPACE, ONNX_DOMAIN, Op
from kpdeploy.ops.packed_attention import PACKED_ATTENTION
from kpdeploy.ops.packed_attention_fp8 import PACKED_ATTENTION_FP8
from kpdeploy.ops.registration import register
from kpdeploy.ops.rms_norm import RMS_NORM
from kpdeploy.ops.rms_norm_fp8 import RMS_NORM_FP8
from kpdeploy.ops.rotary_embedding import ROTARY_EMBEDDING

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        ATTENTION,
        PACKED_ATTENTION,
        LINEAR_ACTIVATION,
        GATED_LINEAR,
        LAYER_NORM,
        RMS_NORM,
        ADD_LAYER_NORM,
        ADD_RMS_NORM,
        ROTARY_EMBEDDING,
    )
}

GPU_OPS: dict[str, Op] = {
    op.name: op
    for op in (
        FP8_QUANTIZE,
        LINEAR_ADD,
        FP8_LINEAR_ACTIVATION,
        FP8_LINEAR_ADD,
        FP8_GATED_LINEAR,
        FP8_LAYER_NORM,
        FP8_RMS_NORM,
        FP8_ADD_LAYER_NORM,
        FP8_ADD_RMS_NORM,
        LAYER_NORM_FP8,
        RMS_NORM_FP8,
        ADD_LAYER_NORM_FP8,
        ADD_RMS_NORM_FP8,
        FP8_ATTENTION_OPERANDS,
        FP8_ATTENTION,
        ATTENTION_FP8,
        PACKED_ATTENTION_FP8,
        ATTENTION_ADD_LAYER_NORM,
        FP8_ATTENTION_ADD_LAYER_NORM,
    )
}
"""Ops in torch for GPUs: no ONNX form, no kernel for CPUs but others' one after the other, and no fusion of
kpdeploy.optimize that makes them: they come into a graph that is lowered for a GPU (kpdeploy.optimize.lowered)."""

__all__ = ["GPU_OPS", "NAMESPACE", "ONNX_DOMAIN", "OPS", "Op", "register"]
