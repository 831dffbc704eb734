"""rotary_embedding: queries or keys turned by their positions, as Llama, Qwen, GPT-NeoX and ModernBERT do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpdeploy.ops.op import Op

if TYPE_CHECKING:
    from torch import Tensor


def reference(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """[B, S, heads·D] from x of that shape, cos and sin [1 or B, S, R] in float32, R even, at most D.

    Of the first R columns h of each head: h · cos + (-second half of h, first half of h) · sin. The others stay.
    """
    import torch

    split = x.double().unflatten(-1, (heads, x.shape[-1] // heads))
    turned, rest = split[..., : cos.shape[-1]], split[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1) if turned.shape[-1] else (turned, turned)
    sides = turned * cos.double().unsqueeze(2) + torch.cat((-second, first), dim=-1) * sin.double().unsqueeze(2)
    return torch.cat((sides, rest), dim=-1).flatten(2).to(x.dtype)


def fake(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    return x.new_empty(x.shape)


ONNX_BODY = """
RotaryEmbedding <heads> (x, cos, sin) => (out) {
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    last = Constant <value_ints = [-1]> ()
    count = Constant <value_int: int = @heads> ()
    heads = Reshape (count, one)
    width = Shape <start = -1> (x)
    size = Div (width, heads)
    rows = Shape <start = 0, end = 2> (x)
    per_head = Concat <axis = 0> (rows, heads, size)
    split = Reshape <allowzero = 1> (x, per_head)
    wide = CastLike (split, cos)
    end = Shape <start = -1> (cos)
    middle = Div (end, two)
    first = Slice (wide, zero, middle, last)
    second = Slice (wide, middle, end, last)
    rest = Slice (wide, end, size, last)
    minus = Neg (second)
    turned = Concat <axis = -1> (first, second)
    across = Concat <axis = -1> (minus, first)
    cos_of_heads = Unsqueeze (cos, two)
    sin_of_heads = Unsqueeze (sin, two)
    along_part = Mul (turned, cos_of_heads)
    across_part = Mul (across, sin_of_heads)
    sides = Add (along_part, across_part)
    joined = Concat <axis = -1> (sides, rest)
    narrow = CastLike (joined, x)
    shape = Shape (x)
    out = Reshape <allowzero = 1> (narrow, shape)
}
"""


ROTARY_EMBEDDING = Op(
    name="rotary_embedding",
    schema="rotary_embedding(Tensor x, Tensor cos, Tensor sin, int heads) -> Tensor",
    onnx="RotaryEmbedding",
    reference=reference,
    fake=fake,
    onnx_body=ONNX_BODY,
    wide=("cos", "sin"),
)
