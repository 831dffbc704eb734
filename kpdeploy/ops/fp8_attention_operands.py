"""fp8_attention_operands: queries, keys and values as the 8-bit floats that fp8_attention takes.

Queries and keys of each head are turned by one rotation (signs, then a Hadamard transform), which leaves their products
as they are and spreads what lies out of line over all columns: QuaRot (Ashkboos et al. 2024), FlashAttention-3 (Shah et
al. 2024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops.fp8_quantize import LARGEST
from kpdeploy.ops.op import gpu_op

if TYPE_CHECKING:
    from torch import Tensor

KEYS = 128
"""Of a block that shares its scales."""

ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
"""How the keys of each 16 lie in value8: as a thread of the tensor cores holds their weights."""

SIGNS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9)
"""A bit for each column of a head, the lowest first; of 64 columns the first number's."""

LEAST, NOTHING = 2.0**-55, 2.0**-100
"""The least scale of queries and keys; that of values that are all 0."""


def turned(heads: Tensor) -> Tensor:
    """[..., D]: each row times the signs and the Hadamard matrix, whose rows are sqrt(D) long."""
    import torch

    size = heads.shape[-1]
    signs = [1 - 2 * (SIGNS[i // 64] >> i % 64 & 1) for i in range(size)]
    column = torch.arange(size)
    ones = (column[:, None] & column)[..., None] >> torch.arange(7) & 1
    matrix = (1 - 2 * (ones.sum(-1) % 2)).to(heads)
    result: Tensor = (heads * torch.tensor(signs).to(heads)) @ matrix
    return result


def in_order(blocks: Tensor) -> Tensor:
    """[..., n * 16]: the keys of each 16 as they lie in value8."""
    ordered: Tensor = blocks.unflatten(-1, (-1, 16))[..., list(ORDER)].flatten(-2)
    return ordered


def reference(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What fp8_attention takes, from query [B, Sq, heads·D], key and value [B, Sk, kv_heads·D] in bfloat16 or float16.

    D is 64 or 128. `lengths`, int64 [B]: how many leading keys count, 0 to Sk; None: all. Others become zeros.
    Keys come in N blocks of 128, the last one of zeros beyond Sk. Gives, dense:

    query8 [B, heads, Sq, D], key8 [B, kv_heads, Sk, D]: float8_e4m3fn, turned.
    value8 [B, kv_heads, D, N·128]: float8_e4m3fn, by columns, keys in the order `ORDER`.
    query_scale [B, heads, Sq]: float32, what 1 stands for in a row of query8.
    block_scale [B, kv_heads, N, 4]: float32, of a block: what 1 stands for in key8, log2 of that of value8,
    its inverse, and 0.
    """
    import torch
    from torch.nn.functional import pad

    batch, keys = key.shape[:2]
    count = torch.full((batch,), keys, device=key.device) if lengths is None else lengths.clamp(0, keys)
    counted = (torch.arange(keys, device=key.device) < count[:, None])[:, None, :, None]

    def split(tensor: Tensor, of: int) -> Tensor:
        per_head: Tensor = tensor.double().unflatten(-1, (of, -1)).transpose(1, 2)
        return per_head

    def in_8_bits(wide: Tensor) -> Tensor:
        eight: Tensor = wide.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return eight.contiguous()

    q = turned(split(query, heads))
    k, v = (split(t, kv_heads).masked_fill(~counted, 0) for t in (key, value))
    k, v = (pad(t, (0, 0, 0, -keys % KEYS)).unflatten(2, (-1, KEYS)) for t in (turned(k), v))
    q_scale = q.abs().amax(-1).clamp(min=LEAST * LARGEST) / LARGEST
    k_scale = k.abs().amax((-2, -1)).clamp(min=LEAST * LARGEST) / LARGEST
    v_most = v.abs().amax((-2, -1))
    v_scale = torch.where(v_most < NOTHING * LARGEST, NOTHING, v_most / LARGEST)
    key8 = (k / k_scale[..., None, None]).flatten(2, 3)[:, :, :keys]
    value8 = in_order((v / v_scale[..., None, None]).flatten(2, 3).mT)
    scales = torch.stack((k_scale, v_scale.log2(), 1 / v_scale, torch.zeros_like(v_scale)), -1)
    return in_8_bits(q / q_scale[..., None]), in_8_bits(key8), in_8_bits(value8), q_scale.float(), scales.float()


def fake(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    import torch

    (batch, queries, width), keys = query.shape, key.shape[1]
    size, blocks = width // heads, (keys + KEYS - 1) // KEYS
    eight, wide = torch.float8_e4m3fn, torch.float32
    return (
        query.new_empty((batch, heads, queries, size), dtype=eight),
        query.new_empty((batch, kv_heads, keys, size), dtype=eight),
        query.new_empty((batch, kv_heads, size, blocks * KEYS), dtype=eight),
        query.new_empty((batch, heads, queries), dtype=wide),
        query.new_empty((batch, kv_heads, blocks, 4), dtype=wide),
    )


FP8_ATTENTION_OPERANDS = gpu_op(
    name="fp8_attention_operands",
    schema="fp8_attention_operands(Tensor query, Tensor key, Tensor value, Tensor? lengths, int heads, int kv_heads) "
    "-> (Tensor query8, Tensor key8, Tensor value8, Tensor query_scale, Tensor block_scale)",
    reference=reference,
    fake=fake,
    dtypes=("bfloat16", "float16"),
)
