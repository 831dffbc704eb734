"""attention: softmax(scale · Q Kᵀ) V for packed heads, with lengths in place of a padding mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops.op import Op

if TYPE_CHECKING:
    from torch import Tensor


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """[B, Sq, heads·D] from query [B, Sq, heads·D] and key, value [B, Sk, kv_heads·D]; D is 1 to 256.

    `lengths`, int64 [B]: how many leading keys of each row count, 0 to Sk; None: all. It bounds the keys only: every
    query row is computed, so that padded rows come out as the unmodified model computes them (Sq = Sk does not tell a
    self-attention from a cross-attention). `causal`: query i sees keys j ≤ i + Sk - Sq. A query that sees no key
    gives 0.
    """
    import torch

    def split(tensor: Tensor, count: int) -> Tensor:
        batch, length, width = tensor.shape
        per_head = tensor.double().reshape(batch, length, count, width // count).transpose(1, 2)
        return per_head.repeat_interleave(heads // count, dim=1)

    q, k, v = split(query, heads), split(key, kv_heads), split(value, kv_heads)
    queries, keys = query.shape[1], key.shape[1]
    visible = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
    if causal:
        visible = visible.tril(keys - queries)
    visible = visible.expand(query.shape[0], 1, queries, keys)
    if lengths is not None:
        visible = visible & (torch.arange(keys, device=query.device) < lengths[:, None, None, None])
    weights = (q @ k.mT * scale).masked_fill(~visible, -torch.inf).softmax(-1)
    weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0)
    return (weights @ v).transpose(1, 2).flatten(2).to(query.dtype)


def fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    return query.new_empty(query.shape)


ATTENTION = Op(
    name="attention",
    schema="attention(Tensor query, Tensor key, Tensor value, Tensor? lengths, int heads, int kv_heads, float scale, "
    "bool causal) -> Tensor",
    onnx="Attention",
    reference=reference,
    fake=fake,
)
