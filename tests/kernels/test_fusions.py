"""What is fused in real architectures, small and with random weights: exact counts, and why the rest was refused."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

from kpdeploy.compare import relative_error
from kpdeploy.decision import Skipped
from kpdeploy.export import FORMATS, Capture
from kpdeploy.export.capture import settle_axes
from kpdeploy.inputs import proof_points, sample
from kpdeploy.load import Request
from kpdeploy.load.describe import model_from_module
from kpdeploy.load.flat import Flat
from kpdeploy.load.huggingface import describe_transformer
from kpdeploy.model import Model
from kpdeploy.ops import ONNX_DOMAIN, OPS
from kpdeploy.optimize import Fused, fuse, parallel_linears
from kpdeploy.optimize.graph import aten, calls
from kpdeploy.signature import parse_inputs

TEXT = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
DECODER = {**TEXT, "num_key_value_heads": 1, "head_dim": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT = {"vocab_size": 99, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2, "bos_token_id": 1}
DISTILBERT = {"vocab_size": 99, "dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 96, "max_position_embeddings": 64}
VISION = {k: TEXT[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
VISION |= {"image_size": 32, "patch_size": 8}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 64, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
WHISPER = {"vocab_size": 99, "d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 96}
WHISPER |= {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 96, "max_source_positions": 50}
WHISPER |= {"num_mel_bins": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
T5 = {"vocab_size": 99, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_heads": 2}


def model(config: str, small: Mapping[str, Any], kind: str = "AutoModel", dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    made = getattr(transformers, config)(**small)
    kind_class = getattr(transformers, kind)
    module = (kind_class.from_config(made) if kind == "AutoModel" else kind_class(made)).eval()
    for parameter in module.parameters():
        if not parameter.detach().any():  # biases start at zero, and would prove nothing
            torch.nn.init.normal_(parameter, std=0.1)
    module = module.to(dtype)
    described = describe_transformer(module, made, Request(max_batch=4), name="small", source={})
    return settle_axes(described, stated=False)


def captured_again(before: Model, fused: Fused) -> Model:
    return settle_axes(replace(before, module=Flat(fused.module, None), program=None), stated=False)


def answers_alike(before: Model, fused: Fused) -> None:
    """The fused module gives the model's answers, captured again with the same axes."""
    again = captured_again(before, fused)
    assert again.signature == before.signature
    assert again.program is not None
    assert before.module is not None
    run, rng = again.program.module(check_guards=False), np.random.default_rng(0)
    for point in proof_points(before.signature, rng)[:4]:
        tensors = [torch.from_numpy(a) for a in sample(before.signature, point, rng).values()]
        with torch.no_grad():
            for ours, theirs in zip(run(*tensors), before.module(*tensors), strict=True):
                assert relative_error(ours.numpy(), theirs.numpy()) <= 1e-5, point


def ops_of(counts: Mapping[str, int]) -> Counter[str]:
    """The same by the op that does it: a linear without an activation is one with none."""
    found: Counter[str] = Counter()
    for name, count in counts.items():
        found["linear_activation" if name == "linear" else name] += count
    return found


COUNTS: list[tuple[str, Mapping[str, Any], str, dict[str, int]]] = [
    ("BertConfig", TEXT, "AutoModel", {"linear": 7, "linear_activation": 2, "attention": 2, "add_layer_norm": 4}),
    # Its positions depend on the tokens: the sum of the embeddings is no broadcast.
    ("RobertaConfig", TEXT, "AutoModel", {"linear": 7, "linear_activation": 2, "attention": 2, "add_layer_norm": 5}),
    (
        "DistilBertConfig",
        DISTILBERT,
        "AutoModel",
        {"linear": 6, "linear_activation": 2, "attention": 2, "add_layer_norm": 4},
    ),
    ("GPT2Config", GPT, "AutoModel", {"linear": 6, "linear_activation": 2, "attention": 2, "add_layer_norm": 4}),
    (
        "LlamaConfig",
        DECODER,
        "AutoModel",
        {"linear": 6, "gated_linear": 2, "attention": 2, "rms_norm": 1, "add_rms_norm": 4, "rotary_embedding": 2},
    ),
    (
        "Qwen2Config",
        DECODER,
        "AutoModel",
        {"linear": 6, "gated_linear": 2, "attention": 2, "rms_norm": 1, "add_rms_norm": 4, "rotary_embedding": 2},
    ),
    (
        "GemmaConfig",
        DECODER,
        "AutoModel",
        {"linear": 8, "linear_activation": 2, "attention": 2, "rms_norm": 1, "add_rms_norm": 4, "rotary_embedding": 2},
    ),
    (
        "MistralConfig",
        DECODER,
        "MistralForCausalLM",
        {"linear": 7, "gated_linear": 2, "attention": 2, "rms_norm": 1, "add_rms_norm": 4, "rotary_embedding": 2},
    ),
    # Norms between the product and the rotation: queries and keys are turned apart.
    (
        "Qwen3Config",
        DECODER,
        "AutoModel",
        {"linear": 6, "gated_linear": 2, "attention": 2, "rms_norm": 5, "add_rms_norm": 4, "rotary_embedding": 4},
    ),
    (
        "Phi3Config",
        DECODER,
        "AutoModel",
        {"linear": 8, "attention": 2, "rms_norm": 1, "add_rms_norm": 4, "rotary_embedding": 2},
    ),
    # A quarter of each head turns, and each head's query, key and value lie side by side.
    (
        "GPTNeoXConfig",
        DECODER,
        "AutoModel",
        {"linear": 6, "linear_activation": 2, "attention": 2, "add_layer_norm": 3, "rotary_embedding": 4},
    ),
    # Every other layer sees a window of keys.
    (
        "ModernBertConfig",
        {**DECODER, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 16},
        "AutoModel",
        {"linear": 8, "attention": 1, "add_layer_norm": 4, "rotary_embedding": 2},
    ),
    ("CohereConfig", DECODER, "AutoModel", {"linear": 6, "gated_linear": 2, "attention": 2}),
    ("T5Config", T5, "AutoModel", {"linear": 6, "linear_activation": 2, "rms_norm": 1, "add_rms_norm": 4}),
    ("ViTConfig", VISION, "AutoModel", {"linear": 7, "linear_activation": 2, "attention": 2, "add_layer_norm": 4}),
    ("SwinConfig", SWIN, "AutoModel", {"linear": 7, "linear_activation": 2, "add_layer_norm": 3}),
    ("WhisperConfig", WHISPER, "AutoModel", {"linear": 6, "linear_activation": 2, "attention": 2, "add_layer_norm": 4}),
    ("CLIPTextConfig", TEXT, "CLIPTextModel", {"linear": 8, "attention": 2, "add_layer_norm": 4}),
    ("CLIPVisionConfig", VISION, "CLIPVisionModel", {"linear": 8, "attention": 2, "add_layer_norm": 3}),
]


SIDE_BY_SIDE = (
    "BertConfig", "RobertaConfig", "DistilBertConfig", "GPT2Config", "ViTConfig", "CLIPTextConfig", "CLIPVisionConfig",
)  # fmt: skip
"""Nothing comes between the product that gives queries, keys and values, and attention."""

JOINED = dict.fromkeys(("GPT2Config", "Phi3Config", "GPTNeoXConfig", "ModernBertConfig"), 0)
"""Groups of linears that became one product, where not the queries, keys and values of each of two layers: some
checkpoints hold them joined."""


REFUSED = {
    "BertConfig": {"1 add_layer_norm": "the residual is broadcast"},
    "T5Config": {"2 attention": "it adds a bias that is no mask, such as relative positions"},
    "SwinConfig": {"2 attention": "it adds a bias that is no mask, such as relative positions"},
    "ModernBertConfig": {
        "2 linear_activation": "gelu follows <built-in function getitem>, not a linear",
        "1 attention": "its mask is neither causal nor a padding of known lengths",
    },
    "CohereConfig": {
        "4 rotary_embedding": "it turns neighbouring columns, not the two halves of a head",
        "3 rms_norm": "the reciprocal root is used in another way",
    },
    "WhisperConfig": {
        "2 linear_activation": "gelu follows aten.conv1d.default, not a linear",
        "1 add_layer_norm": "the residual is broadcast",
    },
}


@pytest.mark.parametrize(("config", "small", "kind", "counts"), COUNTS, ids=[row[0] for row in COUNTS])
def test_real_architectures_fuse_exactly_this_and_give_the_same_answers(
    config: str, small: Mapping[str, Any], kind: str, counts: dict[str, int]
) -> None:
    before = model(config, small, kind)
    fused = fuse(before)
    assert fused.counts == counts
    joined = [d.what for d in fused.decisions if d.what.endswith(parallel_linears.OP)]
    assert joined == [f"fused {n} parallel_linears" for n in [JOINED.get(config, 2)] if n]
    if config in REFUSED:
        assert {d.what: d.reason for d in fused.decisions if isinstance(d, Skipped)} == REFUSED[config]
    answers_alike(before, fused)


@pytest.mark.parametrize(("config", "small", "kind", "counts"), COUNTS, ids=[row[0] for row in COUNTS])
def test_the_files_hold_exactly_these_ops(
    config: str, small: Mapping[str, Any], kind: str, counts: dict[str, int], tmp_path: Path
) -> None:
    before = model(config, small, kind)
    capture = Capture(captured_again(before, fuse(before)), tmp_path)
    for format in ("onnx", "torchscript"):
        (tmp_path / format).mkdir()
        FORMATS[format].export(capture, tmp_path / format)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx")
    found = Counter(node.op_type for node in graph.graph.node if node.domain == ONNX_DOMAIN)
    ops = {OPS[name].onnx: count for name, count in ops_of(counts).items()}
    # The definition of an attention to a joined product calls that of attention.
    assert {function.name for function in graph.functions} == set(found) | ({"Attention"} & set(ops))
    assert found.pop("JoinedAttention", 0) == (ops.pop("Attention") if config in SIDE_BY_SIDE else 0)
    assert found == ops
    script = str(torch.jit.load(tmp_path / "torchscript" / "model.pt").inlined_graph)
    assert Counter(re.findall(r"kpdeploy::(\w+)", script)) == ops_of(counts)


@pytest.mark.parametrize("config", ["BertConfig", "GPT2Config", "LlamaConfig", "ViTConfig"])
def test_in_bfloat16_the_fused_graph_is_as_close_to_the_exact_answer_as_the_plain_one(
    config: str, registered: None
) -> None:
    (row,) = (row for row in COUNTS if row[0] == config)
    before = model(*row[:3], dtype=torch.bfloat16)
    fused = fuse(before)
    assert fused.counts == row[3]
    again = captured_again(before, fused)
    assert again.program is not None
    assert isinstance(before.module, Flat)
    exact = copy.deepcopy(before.module).double()
    exact.dtypes = [torch.float64 if d is torch.bfloat16 else d for d in exact.dtypes]
    run, rng, errors = again.program.module(check_guards=False), np.random.default_rng(0), ([], [])
    for point in proof_points(before.signature, rng)[:6]:
        tensors = [torch.from_numpy(a) for a in sample(before.signature, point, rng).values()]
        with torch.no_grad():
            truth = exact(*tensors)
            for found, into in zip((run(*tensors), before.module(*tensors)), errors, strict=True):
                into.append(max(relative_error(a.numpy(), t.numpy()) for a, t in zip(found, truth, strict=True)))
    assert np.mean(errors[0]) <= 1.5 * np.mean(errors[1])


class Tricky(torch.nn.Module):
    """Places that look like a fusion and are not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        shared = self.linear(x)
        scaled = torch.add(x, shared, alpha=2)
        return {"gelu": torch.nn.functional.gelu(shared), "shared": shared, "norm": self.norm(scaled)}


def test_a_shared_linear_and_a_scaled_residual_are_left_alone_with_the_reason() -> None:
    signature = parse_inputs(["x:float32[batch=1..4,8]"])
    described = model_from_module(Tricky(), signature, name="tricky", source={}, keywords=True)
    before = settle_axes(described, stated=False)
    fused = fuse(before)
    assert fused.counts == {"linear": 1}
    assert {(d.what, d.reason) for d in fused.decisions if isinstance(d, Skipped)} == {
        ("1 linear_activation", "the linear's result is used elsewhere too"),
        ("1 add_layer_norm", "the residual is scaled"),
    }
    answers_alike(before, fused)


def across(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class Turns(torch.nn.Module):
    """Rotations of x [batch, 2, seq, 8], by tables of 4 axes: of all columns, the first 4, the last 4. And what looks
    like them."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.rand(1, 1, 9, 8) * 6
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        cos, sin = (table[:, :, : x.shape[2]].bfloat16().float() for table in (self.cos, self.sin))
        cos4, sin4, first, last = cos[..., :4], sin[..., :4], x[..., :4], x[..., 4:]
        turned = first * cos4 + across(first) * sin4
        pairs = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        quarters = torch.cat((-x[..., 2:4], x[..., :2]), dim=-1)
        exchanged, row = across(x), x[:, 0]
        return {
            "all": x * cos + across(x) * sin,
            "first": torch.cat((turned, last), dim=-1),
            "last": torch.cat((first, last * cos4 + across(last) * sin4), dim=-1),
            "pairs": x * cos + pairs * sin,
            "quarters": first * cos4 + quarters * sin4,
            "shared": x * cos + exchanged * sin + exchanged,
            "less": x * cos - across(x) * sin,
            "each head": x * torch.cat((cos, sin), dim=1) + across(x) * sin,
            "rows": row * cos[:, 0] + across(row) * sin[:, 0],
        }


def test_rotations_are_found_and_what_looks_like_them_is_left_with_the_reason() -> None:
    signature = parse_inputs(["x:float32[batch=1..4,2,seq=1..9,8]"])
    described = model_from_module(Turns(), signature, name="turns", source={}, keywords=True)
    before = settle_axes(described, stated=False)
    fused = fuse(before)
    assert fused.counts == {"rotary_embedding": 3}
    assert {(d.what, d.reason) for d in fused.decisions if isinstance(d, Skipped)} == {
        ("1 rotary_embedding", "it turns neighbouring columns, not the two halves of a head"),
        ("1 rotary_embedding", "it exchanges other columns than the two halves of a head"),
        ("1 rotary_embedding", "its halves are not multiplied by a sine alone"),
        ("1 rotary_embedding", "what a cosine multiplies is not added alone"),
        ("1 rotary_embedding", "its cosines are not one row for each position, of all columns"),
        ("1 rotary_embedding", "its tensor has 3 axes, not batch, heads, length, head size"),
    }
    answers_alike(before, fused)


class Asked(torch.nn.Module):
    """What torch.export writes into a graph as assertions: one that is seen to hold for every length, as are those
    about strides of repeated heads, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        torch._check(torch.sym_min(length * length, length) == length)
        torch._check(length * length % 3 != 2)
        out: torch.Tensor = self.linear(x)
        return out


def test_assertions_that_hold_for_all_sizes_are_dropped_and_others_stay() -> None:
    signature = parse_inputs(["x:float32[batch=1..4,seq=1..9,8]"])
    described = model_from_module(Asked(), signature, name="asked", source={}, keywords=True)
    before = settle_axes(described, stated=True)
    fused = fuse(before)
    left = [n.args[0].meta["val"] for n in calls(fused.module.graph, aten._assert_scalar.default)]
    assert [str(condition).split("(")[0] for condition in left] == ["Ne"]
    answers_alike(before, fused)


class Neutral(torch.nn.Module):
    """A factor of 1, a summand of 0 and a cast that change nothing, and others that do."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        same = (x * 1.0 + 0).type_as(x)
        return {"same": torch.relu(same), "float": ids * 1.0, "twice": x * 2, "cast": ids.type_as(x)}


def test_what_gives_its_input_back_is_dropped() -> None:
    signature = parse_inputs(["x:float32[batch=1..4,8]", "ids:int64[batch=1..4,8]"])
    described = model_from_module(Neutral(), signature, name="neutral", source={}, keywords=True)
    before = settle_axes(described, stated=True)
    fused = fuse(before)
    left = calls(fused.module.graph, aten.mul.Tensor, aten.add.Tensor, aten.type_as.default)
    assert [n.name for n in left] == ["mul_1", "mul_2", "type_as_1"]
    answers_alike(before, fused)


class Parallel(torch.nn.Module):
    """Linears of one input: three that can be joined, and others that look like it."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(8, 12)
        self.up, self.down = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.tied, self.answer = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.scale = torch.nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        narrow, wide = self.narrow(x), self.wide(x)
        split = narrow.view(x.shape[0], 2, 2) @ wide.view(x.shape[0], 2, 6)
        activated = torch.relu(self.up(x)) * torch.relu(self.down(x))
        scaled = torch.nn.functional.linear(x, self.tied.weight * self.scale)
        return {"sum": split.flatten(1), "answer": self.answer(x), "more": activated + self.tied(x) + scaled}


def test_parallel_linears_are_joined_and_the_others_are_left_with_the_reason(tmp_path: Path) -> None:
    signature = parse_inputs(["x:float32[batch=1..4,8]"])
    torch.manual_seed(0)
    described = model_from_module(Parallel(), signature, name="parallel", source={}, keywords=True)
    before = settle_axes(described, stated=False)
    fused = fuse(before)
    assert fused.counts == {"linear_activation": 1, "linear": 3}  # two relu(linear) of x in one; three of six linears
    assert {(d.what, getattr(d, "reason", "")) for d in fused.decisions} == {
        ("fused 1 linear_activation", ""),
        ("fused 3 linear", ""),
        ("fused 2 parallel_linears", ""),
        ("1 parallel_linears", "its weights are computed, not constant"),
        ("1 parallel_linears", "its weight is used elsewhere too"),
        ("1 parallel_linears", "its result is an output"),
    }
    answers_alike(before, fused)
    again = captured_again(before, fused)
    assert again.program is not None
    # Each weight is there once, and four zeros for the bias that `narrow` lacks.
    elements = sum(parameter.numel() for parameter in Parallel().parameters())
    assert sum(tensor.numel() for tensor in again.program.state_dict.values()) == elements + 4
    for format in ("onnx", "torchscript"):
        (tmp_path / format).mkdir()
        FORMATS[format].export(Capture(again, tmp_path), tmp_path / format)
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "onnx" / "model.onnx").graph.node)
    assert ops["Split"] == 2
