"""Padding dropped, fewer bits, and the programs that run in CUDA graphs, here on the CPU without graphs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

from kpdeploy.backends import Lowering
from kpdeploy.compare import relative_error
from kpdeploy.decision import Applied, Skipped
from kpdeploy.errors import ExportFailed
from kpdeploy.export import FORMATS, Capture, cuda
from kpdeploy.export.capture import settle_axes
from kpdeploy.export.cuda import Form
from kpdeploy.inputs import sample
from kpdeploy.load import Request
from kpdeploy.load.factory import from_module
from kpdeploy.load.flat import Flat
from kpdeploy.model import Model
from kpdeploy.ops import GPU_OPS, NAMESPACE, register
from kpdeploy.optimize import fuse
from kpdeploy.optimize.lowered import lowered
from kpdeploy.optimize.pack import pack
from kpdeploy.pipeline.candidates import Candidate, _fused, prove_one
from kpdeploy.pipeline.graphs import OnGpu
from kpdeploy.progress import Progress
from kpdeploy.runtimes import buckets
from kpdeploy.runtimes import cuda as runtime
from kpdeploy.verify import questions

SMALL = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
TEXT = ("input_ids:int64[batch=1..4,seq=1..24]{0..98}", "attention_mask:int64[batch,seq]{mask}")
IMAGE = ("pixel_values:float32[batch=1..4,3,32,32]",)


class Pooled(torch.nn.Module):
    """A BERT that shows its first token, and with `all` every place."""

    def __init__(self, *, everything: bool = False) -> None:
        super().__init__()
        self.model = transformers.BertModel(transformers.BertConfig(**SMALL))
        self.everything = everything

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask)
        found: torch.Tensor = out.last_hidden_state if self.everything else out.pooler_output
        return found


class Counted(Pooled):
    """A RoBERTa: its positions are counted in the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.model = transformers.RobertaModel(transformers.RobertaConfig(**SMALL, pad_token_id=0))


class Embedded(Pooled):
    """A BERT that shows the sum of its embeddings, too, at every place."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        seen: list[torch.Tensor] = []
        hook = self.model.embeddings.LayerNorm.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
        pooled = super().forward(input_ids, attention_mask)
        hook.remove()
        return pooled, seen[0]


class Rotary(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = transformers.LlamaModel(transformers.LlamaConfig(**SMALL, num_key_value_heads=1, use_cache=False))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return found[:, 0]


class Learned(torch.nn.Module):
    """Cosines and sines that were trained."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.rand(1, 24, 16).repeat(1, 1, 2) * 6
        self.cos, self.sin = torch.nn.Parameter(angles.cos()), torch.nn.Parameter(angles.sin())

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x.shape[1]
        return self.cos[:, :rows], self.sin[:, :rows]


class Positioned(Rotary):
    """Its positions are counted in the mask."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        places = attention_mask.cumsum(-1) - 1
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=places)
        found: torch.Tensor = out.last_hidden_state[:, 0]
        return found


class Turned(Rotary):
    def __init__(self) -> None:
        super().__init__()
        config = transformers.CohereConfig(**SMALL, num_key_value_heads=1, use_cache=False, pad_token_id=0)
        self.model = transformers.CohereModel(config)


class Step(torch.nn.Module):
    """One token behind cached ones, whose keys and values it holds."""

    def __init__(self, cached: int = 4095) -> None:
        super().__init__()
        config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, max_position_embeddings=cached + 1)
        self.model, self.cache_type = transformers.LlamaModel(config), transformers.DynamicCache
        shape = (config.num_hidden_layers, 1, 1, cached, config.hidden_size // config.num_attention_heads)
        self.register_buffer("keys", 3 * torch.randn(shape))
        self.register_buffer("values", torch.randn(shape))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        cache = self.cache_type(list(zip(self.keys, self.values, strict=True)))
        found: torch.Tensor = self.model(input_ids=input_ids, past_key_values=cache).last_hidden_state
        return found[:, 0]


class Image(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = {k: v for k, v in SMALL.items() if k != "vocab_size"}
        self.model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(pixel_values=pixel_values).pooler_output
        return found


def model(module: torch.nn.Module, texts: tuple[str, ...] = TEXT) -> Model:
    torch.manual_seed(0)
    for parameter in module.parameters():
        if not parameter.detach().any():  # biases start at zero, and would prove nothing
            torch.nn.init.normal_(parameter, std=0.1)
    request = Request(inputs=texts, example=None, task=None, name="small", max_batch=4)
    return settle_axes(from_module(module.eval(), None, request, name="small", source={}), stated=True)


def answer(of: Model, inputs: Any) -> Any:
    assert of.module is not None
    with torch.no_grad():
        return of.module(*map(torch.from_numpy, inputs.values()))[0].numpy()


def calls(module: torch.fx.GraphModule) -> Counter[str]:
    named = (n.target._schema.name for n in module.graph.nodes if isinstance(n.target, torch._ops.OpOverload))
    return Counter(name.removeprefix(f"{NAMESPACE}::") for name in named if name.startswith(NAMESPACE))


@pytest.fixture(scope="module")
def bert() -> Model:
    return model(Pooled())


@pytest.fixture(scope="module")
def capture(bert: Model, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    found = _fused(Capture(bert, tmp_path_factory.mktemp("capture")), (), ()).capture
    assert found is not None
    return found


POINTS = ({"batch": 1, "seq": 1}, {"batch": 3, "seq": 13}, {"batch": 4, "seq": 24}, {"batch": 2, "seq": 7})


def test_a_batch_without_its_padding_gives_the_same_answers(bert: Model) -> None:
    fused = fuse(bert)
    before = calls(fused.module)
    assert isinstance(pack(fused.module), Applied)
    after = calls(fused.module)
    assert after.pop("packed_attention") == before.pop("attention") == 2
    assert after == before
    rng = np.random.default_rng()
    for point in POINTS:
        inputs = sample(bert.signature, point, rng)
        with torch.no_grad():
            found = fused.module(*map(torch.from_numpy, inputs.values()))[0].numpy()
        assert relative_error(found, answer(bert, inputs)) <= 1e-5, point


@pytest.mark.parametrize("positions_differ", [False, True], ids=["one table", "a table for each row"])
def test_positions_go_with_their_tokens(positions_differ: bool) -> None:
    llama = model(Positioned() if positions_differ else Rotary())
    fused = fuse(llama)
    assert calls(fused.module)["rotary_embedding"] == 2
    assert isinstance(pack(fused.module), Applied)
    assert calls(fused.module)["packed_attention"] == 2
    rng = np.random.default_rng()
    for point in POINTS:
        inputs = sample(llama.signature, point, rng)
        with torch.no_grad():
            found = fused.module(*map(torch.from_numpy, inputs.values()))[0].numpy()
        assert relative_error(found, answer(llama, inputs)) <= 1e-5, point


@pytest.mark.parametrize("bits", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["computed", "folded", "learned"])
def test_cosines_and_sines_stay_float32(kind: str, bits: str, tmp_path: Path) -> None:
    llama = Step(cached=300) if kind == "folded" else Rotary()
    if kind == "learned":
        llama.model.rotary_emb = Learned()
    described = model(llama, ("input_ids:int64[1,1]{0..98}",) if kind == "folded" else TEXT)
    source = _fused(Capture(described, tmp_path), (), ()).capture
    assert source is not None
    made = lowered(source.program, bits=bits, dropped=False, device="cpu").module
    assert calls(made)["rotary_embedding"] == 2
    rng = np.random.default_rng()
    inputs = sample(described.signature, {} if kind == "folded" else POINTS[1], rng)
    with torch.no_grad():
        found = made(*map(torch.from_numpy, inputs.values()))[0].numpy()  # the op takes no other tables
    assert relative_error(found, answer(described, inputs)) <= (1e-2 if bits == "bfloat16" else 1e-5)


def test_padded_places_that_are_shown_become_zeros_and_no_others() -> None:
    shown = model(Pooled(everything=True))
    fused = fuse(shown)
    pack(fused.module)
    inputs = sample(shown.signature, {"batch": 4, "seq": 24}, np.random.default_rng())
    with torch.no_grad():
        found = fused.module(*map(torch.from_numpy, inputs.values()))[0].numpy()
    real = inputs["attention_mask"].astype(bool)
    assert relative_error(found[real], answer(shown, inputs)[real]) <= 1e-5
    assert not found[~real].any()


def without_padding(of: Model, folder: Path, bits: str = "float32") -> torch.fx.GraphModule:
    source = _fused(Capture(of, folder), (), ()).capture
    assert source is not None
    return lowered(source.program, bits=bits, dropped=True, device="cpu", whole=True).module


def with_places(inputs: Any, spare: int = 0) -> list[torch.Tensor]:
    """Inputs, and where their tokens are, with `spare` ones that belong nowhere."""
    mask = inputs["attention_mask"]
    places = [np.empty(size, np.int64) for size in (mask.sum() + spare, mask.sum() + spare, len(mask) + 1)]
    buckets.pack(mask, *places)
    return [torch.from_numpy(array) for array in (*inputs.values(), *places)]


def all_answers(module: torch.nn.Module, tensors: list[torch.Tensor]) -> list[np.ndarray[Any, Any]]:
    with torch.no_grad():
        return [out.numpy() for out in outputs_of(module, *tensors)]


class Computing(torch.fx.Interpreter):
    """The shapes of all floats that a module computes."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: set[tuple[int, ...]] = set()

    def run_node(self, n: torch.fx.Node) -> Any:
        found = super().run_node(n)
        if n.op == "call_function" and isinstance(found, torch.Tensor) and found.is_floating_point():
            self.shapes.add(tuple(found.shape))
        return found


@pytest.mark.parametrize(("bits", "most"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("kind", [Pooled, Counted, Rotary])
def test_nothing_is_computed_on_padded_places_but_ids(
    kind: Callable[[], torch.nn.Module], bits: str, most: float, tmp_path: Path
) -> None:
    of = model(kind())
    module = without_padding(of, tmp_path, bits)
    rng = np.random.default_rng()
    for point in (*POINTS, {"batch": 4, "seq": 1}):  # of one token each
        for spare in (0, 3):
            inputs = sample(of.signature, point, rng)
            (found,) = all_answers(module, with_places(inputs, spare))
            assert relative_error(found, answer(of, inputs)) <= most, (point, spare)
    inputs = sample(of.signature, {"batch": 3, "seq": 13}, rng)
    inputs["attention_mask"] = (np.arange(13) < [[13], [1], [5]]).astype(np.int64)
    computing = Computing(module)
    with torch.no_grad():
        computing.run(*with_places(inputs))
    assert any(shape[:2] == (1, 19) for shape in computing.shapes)
    assert not [s for s in computing.shapes if s[:2] == (3, 13) or s[0] in (3 * 13, 3 * 13 + 1)]


def test_embeddings_without_padding_are_words_and_one_table(bert: Model, tmp_path: Path) -> None:
    module = without_padding(bert, tmp_path)
    aten = torch.ops.aten
    count = Counter(node.target for node in module.graph.nodes)
    assert (count[aten.embedding.default], count[aten.layer_norm.default], count[aten.index_put.default]) == (1, 0, 0)
    assert calls(module)["add_layer_norm"] == 5
    # Ids and the rows of the table as tokens; attention's result and the residual as the first of each row.
    assert count[aten.index_select.default] == 4


def test_a_row_without_tokens_reads_no_others(bert: Model, tmp_path: Path) -> None:
    module, rng = without_padding(bert, tmp_path), np.random.default_rng()
    alone = sample(bert.signature, {"batch": 1, "seq": 13}, rng)
    alone["attention_mask"][:] = 0
    (expected,) = all_answers(module, with_places(alone, 1))
    for lengths in ([0, 5, 0, 13], [13, 0, 1, 0], [4, 13, 0, 0]):
        inputs = sample(bert.signature, {"batch": 4, "seq": 13}, rng)
        inputs["attention_mask"] = (np.arange(13) < np.array(lengths)[:, None]).astype(np.int64)
        (found,) = all_answers(module, with_places(inputs))
        real = np.array(lengths) > 0
        assert relative_error(found[real], answer(bert, {name: a[real] for name, a in inputs.items()})) <= 1e-5
        assert relative_error(found[~real], expected.repeat(2, 0)) <= 1e-6


@pytest.mark.parametrize(
    ("kind", "unpacked"),
    [
        (lambda: Chosen(0), 0),
        # The last place of a row may be padding.
        (lambda: Chosen(-1), 2),
        (lambda: Pooled(everything=True), 1),
        (lambda: Chosen(0, also=True), 1),
    ],
    ids=["first", "last", "all", "first and all"],
)
def test_tokens_are_a_batch_again_where_others_than_the_first_are_read(
    kind: Callable[[], torch.nn.Module], unpacked: int, tmp_path: Path
) -> None:
    of = model(kind())
    module = without_padding(of, tmp_path)
    assert sum(node.target is torch.ops.aten.index_put.default for node in module.graph.nodes) == unpacked
    inputs = sample(of.signature, {"batch": 3, "seq": 13}, np.random.default_rng())
    if unpacked:
        inputs["attention_mask"][:] = 1
    assert relative_error(all_answers(module, with_places(inputs, 2))[0], answer(of, inputs)) <= 1e-5


@pytest.mark.parametrize("kind", [Pooled, Counted, Rotary])
@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_without_padding_a_file_gives_the_same_answers(
    format: str, kind: Callable[[], torch.nn.Module], tmp_path: Path
) -> None:
    import onnxruntime

    of = model(kind())
    packed = _fused(Capture(of, tmp_path), (), ()).packed
    assert packed is not None
    FORMATS[format].export(packed, tmp_path)
    run: Callable[..., Any]
    if format == "onnx":
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]
        run = lambda inputs: session.run(None, dict(zip(names, inputs.values(), strict=True)))[0]  # noqa: E731
    else:
        script = torch.jit.load(tmp_path / "model.pt")
        run = lambda inputs: all_answers(script, list(map(torch.from_numpy, inputs.values())))[0]  # noqa: E731
    for point in POINTS:
        inputs = sample(of.signature, point, np.random.default_rng())
        assert relative_error(run(inputs), answer(of, inputs)) <= 1e-5, point


def test_embeddings_that_are_shown_keep_their_padded_places(tmp_path: Path) -> None:
    of = model(Embedded())
    module = without_padding(of, tmp_path)
    assert not [node for node in module.graph.nodes if node.target is torch.ops.aten.index_put.default]
    inputs = sample(of.signature, {"batch": 4, "seq": 13}, np.random.default_rng())
    assert of.module is not None
    expected = all_answers(of.module, [torch.from_numpy(array) for array in inputs.values()])
    for found, wanted in zip(all_answers(module, with_places(inputs)), expected, strict=True):
        assert relative_error(found, wanted) <= 1e-5


@pytest.mark.parametrize(
    ("module", "texts", "why"),
    [
        (Image, IMAGE, "an attention sees no padding mask"),
        # Positions turn neighbouring columns, which is no op here, between the product and attention.
        (Turned, TEXT, "tokens meet others in"),
    ],
)
def test_padding_stays_where_tokens_do_not_stand_alone(
    module: Callable[[], torch.nn.Module], texts: tuple[str, ...], why: str
) -> None:
    fused = fuse(model(module(), texts))
    before = calls(fused.module)
    told = pack(fused.module)
    assert isinstance(told, Skipped)
    assert why in told.reason
    assert calls(fused.module) == before


def made(capture: Capture, folder: Path, form: Form, **given: Any) -> Any:
    found = lowered(capture.program, bits=form.precision, dropped=form.dropped, device="cpu", whole=True, **given)
    cuda.export(capture, folder, form, module=Flat(found.module, None), constant=found.constant, device="cpu")
    return runtime.load(str(folder / cuda.FILENAME), inputs=(), outputs=(), settings={})


@pytest.mark.parametrize(("bits", "most"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_program_gives_the_models_answers_in_every_bucket(
    capture: Capture, bert: Model, tmp_path: Path, bits: str, most: float, dropped: bool
) -> None:
    before = {name: p.clone() for name, p in bert.module.named_parameters()}  # type: ignore[union-attr]
    run = made(capture, tmp_path, Form(precision=bits, dropped=dropped, padded=("batch", "seq")))
    rng = np.random.default_rng()
    for point in (*POINTS, *POINTS[::-1]):  # a small request after a large one finds nothing of it
        inputs = sample(bert.signature, point, rng)
        (found,) = run(list(inputs.values()))
        assert found.dtype == np.float32
        assert relative_error(found, answer(bert, inputs)) <= most, point
    assert run.missed == 0
    # What is exported is a copy: the model that the proof asks is as it was.
    assert all(torch.equal(p, before[name]) for name, p in bert.module.named_parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("dropped", [False, True])
def test_what_fits_no_bucket_runs_without_one_and_is_counted(
    capture: Capture, bert: Model, tmp_path: Path, dropped: bool
) -> None:
    made(capture, tmp_path, Form(dropped=dropped, padded=("batch", "seq")))
    described = json.loads((tmp_path / cuda.GRAPHS).read_text())
    described["buckets"] = [b for b in described["buckets"] if b["batch"] <= 2]
    (tmp_path / cuda.GRAPHS).write_text(json.dumps(described))
    run = runtime.load(str(tmp_path / cuda.FILENAME), inputs=(), outputs=(), settings={})
    inputs = sample(bert.signature, {"batch": 3, "seq": 9}, np.random.default_rng())
    assert relative_error(run(list(inputs.values()))[0], answer(bert, inputs)) <= 1e-5
    assert run.missed == 1
    inputs["attention_mask"][:] = 0
    assert np.isfinite(run(list(inputs.values()))[0]).all()


def test_a_bucket_may_be_full_of_tokens_and_have_rows_without(capture: Capture, bert: Model, tmp_path: Path) -> None:
    run = made(capture, tmp_path, Form(dropped=True, padded=("batch", "seq")))
    sizes = {"batch": 4, "seq": 24, "tokens": 48}
    assert sizes in run.buckets
    run.ladder.described = {**run.described, "buckets": [bucket for bucket in run.buckets if bucket == sizes]}
    run.captured = [each for each, bucket in zip(run.captured, run.buckets, strict=True) if bucket == sizes]
    inputs = sample(bert.signature, {"batch": 3, "seq": 16}, np.random.default_rng())
    inputs["attention_mask"][:] = 1
    assert relative_error(run(list(inputs.values()))[0], answer(bert, inputs)) <= 1e-5
    assert run.missed == 0


class Computed:
    """In the place of a captured graph: its replay computes what is in the inputs into the same outputs."""

    def __init__(self, bucket: Any) -> None:
        self.bucket = bucket
        bucket.graph = self
        with torch.inference_mode():
            bucket.outputs = list(bucket.graphs.program(*bucket.inputs))

    def replay(self) -> None:
        with torch.inference_mode():
            for output, result in zip(
                self.bucket.outputs, self.bucket.graphs.program(*self.bucket.inputs), strict=True
            ):
                output.copy_(result)


@pytest.mark.parametrize("small", [1 << 16, 0], ids=["small", "large"])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("length", ["1..24", "24..24"])
def test_requests_are_staged_and_answered_as_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: str, dropped: bool, small: int
) -> None:
    text = ("input_ids:int64[batch=1..4,seq=" + length + "]{0..98}", "attention_mask:int64[batch,seq]{mask}")
    asked = model(Pooled(), text)
    source = _fused(Capture(asked, tmp_path), (), ()).capture
    assert source is not None
    form = Form(dropped=dropped, padded=tuple(axis.name for axis in asked.signature.axes))
    program = made(source, tmp_path, form).program
    described = json.loads((tmp_path / cuda.GRAPHS).read_text())
    for name in ("zeros", "empty"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, plain=plain, dtype, **_: plain(*a, dtype=dtype))
    for name in ("Stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(runtime, "SMALL", small)
    monkeypatch.setattr(runtime._Bucket, "_capture", lambda bucket: Computed(bucket))
    run = runtime.Graphs(program, {**described, "device": "cuda"})
    assert run.memory.data_ptr() != run.host.data_ptr()
    for point in ({"batch": 3, "seq": 13}, {"batch": 4, "seq": 24}, {"batch": 1, "seq": 2}, {"batch": 2, "seq": 24}):
        inputs = sample(asked.signature, point, np.random.default_rng())
        expected = answer(asked, inputs)
        (found,) = run(list(inputs.values()))
        assert relative_error(found, expected) <= 1e-5, point
        (there,) = run([torch.from_numpy(array) for array in inputs.values()])
        assert relative_error(there.numpy(), expected) <= 1e-5, point
    assert run.missed == 0


def test_calls_from_several_threads_do_not_mix(capture: Capture, bert: Model, tmp_path: Path) -> None:
    run = made(capture, tmp_path, Form(dropped=True, padded=("batch", "seq")))
    rng = np.random.default_rng()
    asked = [sample(bert.signature, POINTS[i % 4], rng) for i in range(24)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda inputs: run(list(inputs.values()))[0], asked))
    assert all(relative_error(a, answer(bert, i)) <= 1e-5 for a, i in zip(found, asked, strict=True))


@pytest.mark.parametrize("bits", ["float32", "bfloat16"])
def test_embeddings_of_positions_are_one_table(capture: Capture, bert: Model, bits: str) -> None:
    module = lowered(capture.program, bits=bits, dropped=False, device="cpu").module
    embeddings = [n for n in module.graph.nodes if n.target is torch.ops.aten.embedding.default]
    assert len(embeddings) == 1  # of words
    counts = calls(module)
    assert counts["add_layer_norm"] + counts["attention_add_layer_norm"] == 5
    rng = np.random.default_rng()
    for point in POINTS:
        inputs = sample(bert.signature, point, rng)
        with torch.no_grad():
            found = module(*map(torch.from_numpy, inputs.values()))[0].numpy()
        assert relative_error(found, answer(bert, inputs)) <= (1e-5 if bits == "float32" else 2e-2), point


def test_a_cache_is_not_copied_but_to_append_to_it(tmp_path: Path) -> None:
    step = model(Step(), ("input_ids:int64[1,1]{0..99}",))
    source = _fused(Capture(step, tmp_path), (), ()).capture
    assert source is not None
    made = lowered(source.program, bits="bfloat16", dropped=False, device="cpu").module
    caches = [node for node in made.graph.nodes if node.target is torch.ops.aten.cat.default and node.args[1] == 1]
    assert len(caches) == 4  # keys and values of two layers
    assert all(node.args[0][0].op == "get_attr" for node in caches)
    held = {str(node.args[0][0].target) for node in caches}
    assert {b.dtype for name, b in made.named_buffers() if name in held} == {torch.bfloat16}
    assert all(node.args[0][1].target is torch.ops.aten.contiguous.default for node in caches)  # columns of a product
    assert not any("keys" in name for name, _ in made.named_buffers())
    inputs = sample(step.signature, {}, np.random.default_rng())
    with torch.no_grad():
        found = made(*map(torch.from_numpy, inputs.values()))[0].numpy()
    assert relative_error(found, answer(step, inputs)) <= 1e-2


class Chosen(torch.nn.Module):
    """A Llama that shows one token, and with `also` every place."""

    def __init__(self, index: int, *, causal: bool = True, also: bool = False) -> None:
        super().__init__()
        self.model = Rotary().model if causal else Pooled().model
        self.index, self.also = index, also

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return (found[:, self.index], found.sum()) if self.also else (found[:, self.index],)


@pytest.mark.parametrize(
    ("index", "causal", "also", "narrow"),
    [
        (0, False, False, 4),
        (-1, False, False, 4),
        (0, True, False, 3),  # its attention would see more
        (-1, True, False, 4),
        (0, False, True, 0),
        (1, False, False, 0),
    ],
)
def test_rows_that_nothing_reads_are_not_computed(
    index: int, causal: bool, also: bool, narrow: int, tmp_path: Path
) -> None:
    shown = model(
        Chosen(index, causal=causal, also=also), TEXT if index != 1 else (TEXT[0].replace("1..24", "2..24"), TEXT[1])
    )
    source = _fused(Capture(shown, tmp_path), (), ()).capture
    assert source is not None
    made = lowered(source.program, bits="float32", dropped=False, device="cpu").module
    costly = ("attention", "linear_activation", "gated_linear")
    nodes = [n for n in made.graph.nodes if n.name.startswith(costly) and n.meta["val"].dim() == 3]
    assert sum(n.meta["val"].shape[1] == 1 for n in nodes) == narrow  # with the output's product, up and down
    for sizes in ({"batch": 3, "seq": 13}, {"batch": 2, "seq": 2}):
        inputs = sample(shown.signature, sizes, np.random.default_rng())
        with torch.no_grad():
            found = made(*map(torch.from_numpy, inputs.values()))[0].numpy()
        assert relative_error(found, answer(shown, inputs)) <= 1e-5


class LastOfAttention(torch.nn.Module):
    """Attention whose queries, keys and values are products apart, and one token of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.randn(64, 64) / 8 for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.kpdeploy
        q, k, v = (ops.linear_activation(x, w, None, "none") for w in self.weights[:3])
        attended = ops.attention(q, k, v, None, 2, 2, 0.18, False)
        shown: torch.Tensor = ops.linear_activation(attended, self.weights[3], None, "none")[:, -1]
        return shown


@pytest.mark.parametrize(("bits", "most"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_keys_are_read_by_the_query_that_is_left(bits: str, most: float) -> None:
    register()
    module, x = LastOfAttention().eval(), torch.randn(3, 9, 64)
    made = lowered(torch.export.export(module, (x,)), bits=bits, dropped=False, device="cpu").module
    rows = [n.meta["val"].shape[1] for n in made.graph.nodes if n.name.startswith("linear_activation")]
    assert sorted(rows) == [1, 1, 9, 9]  # queries and the output of one token, keys and values of all
    with torch.no_grad():
        assert relative_error(made(x).numpy(), module(x).numpy()) <= most


@pytest.mark.usefixtures("references")
def test_scales_are_for_all_rows_where_one_is_read() -> None:
    """Of a short sequence the token that is read is another one."""
    x = torch.randn(3, 9, 64)
    x[:, 2] *= 50
    module = LastOfAttention().eval()
    samples = [{"x": x.numpy()}]
    program = torch.export.export(module, (x,))
    found = lowered(program, bits="fp8", dropped=False, device="cpu", samples=samples, budget=1)
    (queries,) = (layer for layer in found.layers if layer.name == "weights.0")
    assert queries.scale == pytest.approx(float(x.abs().max()) / 448, rel=1e-2)


class Angles(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", 10000 ** (-torch.arange(0, 16) / 16))
        self.linear = torch.nn.Linear(16, 16)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        turned: torch.Tensor = self.linear((positions.float() @ self.frequencies[None]).cos())
        return turned


def test_angles_are_computed_in_float32() -> None:
    turns = Angles().eval()
    positions = torch.arange(2000, 2048)[:, None]
    made = lowered(torch.export.export(turns, (positions,)), bits="bfloat16", dropped=False, device="cpu").module
    assert {t.dtype for t in made.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert relative_error(made(positions).numpy(), turns(positions).numpy()) <= 1e-2


class Embeddings(torch.nn.Module):
    """Words and positions; `shown`: their sum is an output, too. `learned`: positions come in, as RoBERTa's do."""

    def __init__(self, *, shown: bool, learned: bool) -> None:
        super().__init__()
        self.words, self.places = torch.nn.Embedding(99, 64), torch.nn.Embedding(24, 64)
        self.norm = torch.nn.LayerNorm(64)
        self.register_buffer("ids", torch.arange(24)[None])
        self.shown, self.learned = shown, learned

    def forward(self, input_ids: torch.Tensor) -> Any:
        places = input_ids % 24 if self.learned else self.ids[:, : input_ids.shape[1]]  # type: ignore[index]
        total = self.words(input_ids) + self.places(places)
        return (self.norm(total), total) if self.shown else self.norm(total)


@pytest.mark.parametrize(
    ("shown", "learned", "tables"),
    [(False, False, 1), (True, False, 0), (False, True, 0)],
    ids=["known", "shown", "learned"],
)
def test_a_table_is_only_of_what_is_known_and_read_by_the_norm_alone(shown: bool, learned: bool, tables: int) -> None:
    module = Embeddings(shown=shown, learned=learned).eval()
    ids = torch.randint(0, 99, (3, 7))
    sizes = {"batch": torch.export.Dim("batch", min=1, max=4), "seq": torch.export.Dim("seq", min=1, max=24)}
    program = torch.export.export(module, (ids,), dynamic_shapes=({0: sizes["batch"], 1: sizes["seq"]},))
    found = lowered(program, bits="float32", dropped=False, device="cpu").module
    assert calls(found)["add_layer_norm"] == tables
    for shape in ((3, 7), (1, 1), (4, 24)):
        ids = torch.randint(0, 99, shape)
        with torch.no_grad():
            pairs = zip(outputs_of(found, ids), outputs_of(module, ids), strict=True)
        assert max(relative_error(a.numpy(), b.numpy()) for a, b in pairs) <= 1e-5


def outputs_of(module: torch.nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    out = module(*inputs)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("bits", "fused"), [("bfloat16", 1), ("float32", 0)])
def test_attention_its_output_and_the_norm_are_one_op_for_a_gpu(
    capture: Capture, bits: str, fused: int, dropped: bool
) -> None:
    counts = calls(lowered(capture.program, bits=bits, dropped=dropped, device="cpu", whole=True).module)
    assert counts["attention_add_layer_norm"] == fused
    # The last layer is read at one token each: that is left to the kernels of its parts.
    assert counts["packed_attention" if dropped else "attention"] == 2 - fused
    # And the embeddings' norm, with the positions' table: but for that, one more in each layer, whose product adds.
    assert counts["add_layer_norm"] == (1 if fused else 5)
    assert counts["linear_add"] == (3 if fused else 0)


def test_an_output_that_others_read_too_stays_apart() -> None:
    class Shown(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = transformers.BertModel(transformers.BertConfig(**SMALL)).encoder.layer[0].attention

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            seen: list[torch.Tensor] = []
            hook = self.layer.output.dense.register_forward_hook(lambda _m, _i, out: seen.append(out))
            out = self.layer(x)[0]
            hook.remove()
            return out, seen[0]

    fused = fuse(model(Shown(), ("x:float32[batch=1..4,seq=1..24,64]",)))
    program = torch.export.export(fused.module, (torch.randn(2, 8, 64),), strict=False)
    counts = calls(lowered(program, bits="bfloat16", dropped=False, device="cpu", whole=True).module)
    assert (counts["attention"], counts["attention_add_layer_norm"]) == (1, 0)


class Summed(torch.nn.Module):
    """A linear, what it is added to, and the norm of both; in one way or another."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(64, 64) / 8)
        self.scale, self.way = torch.nn.Parameter(torch.rand(64) + 0.5), way

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ops = torch.ops.kpdeploy
        made = ops.linear_activation(x, self.weight, None, "gelu" if self.way == "activated" else "none")
        if self.way == "rms":
            return ops.add_rms_norm(x, made, self.scale, 1e-6)
        normalized, total = ops.add_layer_norm(made, x, self.scale, None, 1e-5)
        return (normalized, total, made) if self.way == "shown" else (normalized, total)


@pytest.mark.parametrize(("way", "fused"), [("layer", 1), ("rms", 1), ("activated", 0), ("shown", 0)])
def test_a_linear_adds_what_its_norm_would(way: str, fused: int) -> None:
    register()
    x, module = torch.randn(3, 7, 64), Summed(way).eval()
    made = lowered(torch.export.export(module, (x,)), bits="bfloat16", dropped=False, device="cpu", whole=True).module
    counts = calls(made)
    assert counts["linear_add"] == fused
    assert counts["add_layer_norm"] + counts["add_rms_norm"] == 1 - fused
    with torch.no_grad():
        for found, wanted in zip(made(x), module(x), strict=True):
            assert relative_error(found.numpy(), wanted.numpy()) <= 1e-2


# 8 bits: on a CPU the ops' references stand in for their kernels.


@pytest.fixture
def references() -> Iterator[None]:
    register()  # first: what is registered last counts
    library = torch.library.Library(NAMESPACE, "IMPL")
    for op in GPU_OPS.values():
        library.impl(op.name, op.reference, "CPU")
    yield
    library._destroy()


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("dropped", [False, True])
def test_products_in_8_bits_read_what_norms_and_products_give_in_8_bits(
    capture: Capture, bert: Model, tmp_path: Path, dropped: bool
) -> None:
    rng = np.random.default_rng()
    samples = [sample(bert.signature, {"batch": 4, "seq": 24}, rng) for _ in range(3)]
    found = lowered(capture.program, bits="fp8", dropped=dropped, device="cpu", samples=samples, budget=1, whole=True)
    counts = calls(found.module)
    # A layer: queries, keys and values in one, attention's output, two of the MLP; and the pooler.
    # Attention, its output and the norm behind it are one op but in the last layer, whose queries are of one token each
    # where there is padding, and whose result is else read at the first tokens alone. The pooler's input passes by
    # itself, and without padding the first tokens of what the last attention gives of all. All else is fused.
    # Attention's output and the MLP's second product add the residual.
    wanted = Counter(fp8_linear_activation=5, fp8_linear_add=3, fp8_attention_add_layer_norm=1, fp8_add_layer_norm=1)
    wanted.update(fp8_layer_norm=2, layer_norm=1)
    wanted.update({"packed_attention": 1, "fp8_quantize": 2} if dropped else {"attention_fp8": 1, "fp8_quantize": 1})
    assert counts == wanted
    form = Form(precision="fp8", dropped=dropped, padded=("batch", "seq"))
    cuda.export(capture, tmp_path, form, module=Flat(found.module, None), device="cpu")
    run = runtime.load(str(tmp_path / cuda.FILENAME), inputs=(), outputs=(), settings={})
    inputs = sample(bert.signature, {"batch": 3, "seq": 13}, rng)
    assert relative_error(run(list(inputs.values()))[0], answer(bert, inputs)) <= 0.2


def test_layers_that_cost_too_much_stay_in_16_bits(capture: Capture, bert: Model) -> None:
    samples = [sample(bert.signature, {"batch": 4, "seq": 24}, np.random.default_rng(0))]
    whole = lowered(capture.program, bits="fp8", dropped=False, device="cpu", samples=samples, budget=1)
    alone = sorted(layer.error for layer in whole.layers)
    part = lowered(capture.program, bits="fp8", dropped=False, device="cpu", samples=samples, budget=alone[4] * 1.3)
    kept = [layer.error for layer in part.layers if layer.kept]
    assert 0 < len(kept) < len(part.layers)
    assert min(kept) >= max(layer.error for layer in part.layers if not layer.kept)
    counts = calls(part.module)
    assert counts["linear_activation"] + counts["attention_add_layer_norm"] == len(kept)
    with pytest.raises(ExportFailed, match="no product can be computed in 8 bits within the budget"):
        lowered(capture.program, bits="fp8", dropped=False, device="cpu", samples=samples, budget=1e-7)


@pytest.mark.usefixtures("references")
def test_all_products_of_a_llama_are_in_8_bits(tmp_path: Path) -> None:
    llama, rng = model(Rotary()), np.random.default_rng()
    capture = _fused(Capture(llama, tmp_path), (), ()).capture
    assert capture is not None
    samples = [sample(llama.signature, {"batch": 4, "seq": 24}, rng) for _ in range(3)]
    found = lowered(capture.program, bits="fp8", dropped=False, device="cpu", samples=samples, budget=1)
    counts = calls(found.module)
    # A layer: queries, keys and values in one, attention's output, gate and up in one, down.
    assert (counts["fp8_linear_activation"], counts["fp8_gated_linear"]) == (6, 2)
    assert not {"linear_activation", "gated_linear", "rms_norm"} & set(counts)
    # Every norm quantizes but the last, which no product reads; and as products alone read them, they do nothing else.
    assert (counts["rms_norm_fp8"], counts["add_rms_norm_fp8"], counts["add_rms_norm"]) == (1, 3, 1)
    assert not {"fp8_rms_norm", "fp8_add_rms_norm"} & set(counts)
    for node in found.module.graph.nodes:
        if node.target is torch.ops.kpdeploy.fp8_gated_linear.default:
            (down,) = node.users
            assert down.target is torch.ops.kpdeploy.fp8_linear_activation.default
            assert down.args[0] is node
            assert node.args[6] is not None
    assert sum("gate_proj" in layer.name and "up_proj" in layer.name for layer in found.layers) == 2
    form = Form(precision="fp8", padded=("batch", "seq"))
    cuda.export(capture, tmp_path, form, module=Flat(found.module, None), constant=found.constant, device="cpu")
    run = runtime.load(str(tmp_path / cuda.FILENAME), inputs=(), outputs=(), settings={})
    inputs = sample(llama.signature, {"batch": 3, "seq": 13}, rng)
    assert relative_error(run(list(inputs.values()))[0], answer(llama, inputs)) <= 0.15


class Normed(torch.nn.Module):
    """A norm that a product reads, and the sum that it may add. `shown`: the norm is a result, too."""

    def __init__(self, norm: str, shown: bool) -> None:
        super().__init__()
        self.norm, self.bias, self.eps = torch.nn.Parameter(torch.rand(64)), torch.nn.Parameter(torch.randn(64)), 1e-5
        self.weight = torch.nn.Parameter(torch.randn(96, 64) / 8)
        self.kind, self.shown = norm, shown

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        taken = (x, x.flip(1)) if "add" in self.kind else (x,)
        rest = (self.norm, self.bias, self.eps) if "layer" in self.kind else (self.norm, self.eps)
        made = getattr(torch.ops.kpdeploy, self.kind)(*taken, *rest)
        normalized, *total = made if isinstance(made, tuple) else (made,)
        product = torch.ops.kpdeploy.linear_activation(normalized, self.weight, None, "gelu")
        return (product, *total, *([normalized] if self.shown else []))


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("shown", [False, True], ids=["read in 8 bits alone", "read"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
def test_a_norm_gives_16_bits_where_something_reads_them(norm: str, shown: bool) -> None:
    torch.manual_seed(0)
    module, x = Normed(norm, shown).eval(), torch.randn(8, 64)
    program = torch.export.export(module, (x,))
    samples = [{"x": x.numpy()}]
    found = lowered(program, bits="fp8", dropped=False, device="cpu", samples=samples, budget=1)
    assert calls(found.module) == {f"fp8_{norm}" if shown else f"{norm}_fp8": 1, "fp8_linear_activation": 1}
    assert found.constant
    with torch.no_grad():
        pairs = zip(found.module(x), module(x), strict=True)
    assert max(relative_error(a.numpy(), b.numpy()) for a, b in pairs) <= 0.1


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("whole", [False, True])
def test_norms_of_a_vision_transformer_are_read_in_8_bits_alone(tmp_path: Path, whole: bool) -> None:
    vit, rng = model(Image(), IMAGE), np.random.default_rng()
    capture = _fused(Capture(vit, tmp_path), (), ()).capture
    assert capture is not None
    samples = [sample(vit.signature, {"batch": 4}, rng)]
    found = lowered(capture.program, bits="fp8", dropped=False, device="cpu", samples=samples, budget=1, whole=whole)
    counts = calls(found.module)
    # Of two layers' four norms the first is torch's own, and a pass quantizes it; of few rows one is attention's op.
    assert counts["layer_norm_fp8" if whole else "add_layer_norm_fp8"] == 3 - counts["fp8_attention_add_layer_norm"]
    assert counts["fp8_attention_add_layer_norm"] == whole
    assert counts["fp8_quantize"] == 2
    assert not {"fp8_layer_norm", "fp8_add_layer_norm"} & set(counts)
    inputs = sample(vit.signature, {"batch": 3}, rng)
    with torch.no_grad():
        (out,) = Flat(found.module, None)(torch.from_numpy(inputs["pixel_values"]))
    assert relative_error(out.numpy(), answer(vit, inputs)) <= 0.2


class Gated(torch.nn.Module):
    """The MLP of a Llama. `loud`: in a channel that has no weight, the input is too large for the rest in 8 bits."""

    def __init__(self, loud: str) -> None:
        super().__init__()
        self.gate, self.up = (torch.nn.Parameter(torch.randn(96, 64) / 8) for _ in range(2))
        self.down = torch.nn.Parameter(torch.randn(64, 96) / 10)
        self.loud = loud
        with torch.no_grad():
            for weight in {"": (), "gated": (self.gate, self.up), "down": (self.down,)}[loud]:
                weight[:, 0] = 0
            if loud == "down":
                self.gate[0], self.up[0] = 1e3, 1e3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.kpdeploy
        if self.loud == "gated":
            x = x + torch.nn.functional.one_hot(torch.tensor(0), 64) * 1e6
        inner = ops.gated_linear(x, self.gate, self.up)
        found: torch.Tensor = ops.linear_activation(inner, self.down, None, "none")
        return found


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize(
    ("loud", "left", "wanted"),
    [
        ("", "", {"fp8_quantize": 1, "fp8_gated_linear": 1, "fp8_linear_activation": 1}),
        ("gated", "gate + up", {"gated_linear": 1, "fp8_quantize": 1, "fp8_linear_activation": 1}),
        ("down", "down", {"fp8_quantize": 1, "fp8_gated_linear": 1, "linear_activation": 1}),
    ],
)
def test_a_gated_product_that_costs_too_much_stays_in_16_bits(loud: str, left: str, wanted: dict[str, int]) -> None:
    torch.manual_seed(0)
    samples = [{"x": torch.randn(8, 64).numpy()} for _ in range(2)]
    program = torch.export.export(Gated(loud), (torch.randn(8, 64),))
    found = lowered(program, bits="fp8", dropped=False, device="cpu", samples=samples, budget=0.25)
    assert calls(found.module) == wanted
    assert [layer.name for layer in found.layers if layer.kept] == ([left] if left else [])
    assert [layer.name for layer in found.layers] == ["gate + up", "down"]


# The candidates of the pipeline.


def on_cpu(of: Model, folder: Path) -> tuple[OnGpu, Callable[[Any], Any]]:
    whole = Capture(of, folder)
    asked = questions(
        of.signature, lambda inputs: {of.signature.outputs[0].name: answer(of, inputs)}, np.random.default_rng()
    )
    tolerances = {"float32": 1e-5}
    made = OnGpu(whole, _fused(whole, (), ()), (), 1e-2, Progress(), device="cpu")
    return made, lambda artifact: prove_one(artifact, of, asked, tolerances)


WAY = Lowering(level=1, precision="float32", format="cuda", settings={"precision": "float32"})


def test_a_candidate_without_padding_is_proven_in_a_process_of_its_own(bert: Model, tmp_path: Path) -> None:
    maker, prove = on_cpu(bert, tmp_path)
    found = maker.candidate(WAY, [], prove)
    assert found.passed, found.reason
    assert found.settings["padding"] == "dropped"
    assert found.verdict is not None
    assert found.verdict.padded_axes == ("seq",)
    assert found.verdict.max_batch_size == 4
    again = maker.candidate(WAY, [found], prove)
    assert "another precision of its level has passed" in again.reason


PRECISIONS = (("float32", 1, 1e-5), ("float16", 2, 2e-3), ("bfloat16", 2, 2e-2))


def onnx_candidate(folder: Path, precision: str, level: int, bound: float, device: str) -> Candidate:
    of = model(Pooled())
    maker, _ = on_cpu(of, folder)
    settings = {"device": "cuda", "precision": precision}
    way = Lowering(level=level, precision=precision, format="onnx", settings=settings)
    reference = lambda inputs: {of.signature.outputs[0].name: answer(of, inputs)}  # noqa: E731
    asked = questions(of.signature, reference, np.random.default_rng())
    prove = lambda artifact: prove_one(artifact, of, asked, {"float32": bound})  # noqa: E731
    return replace(maker, device=device).candidate(way, [], prove)


@pytest.mark.parametrize(("precision", "level", "bound"), PRECISIONS[:2])
def test_the_same_as_onnx_is_proven_in_buckets_and_without_its_library(
    precision: str, level: int, bound: float, onnx_library: str, tmp_path: Path
) -> None:
    found = onnx_candidate(tmp_path, precision, level, bound, "cpu")
    assert found.passed, found.reason
    assert found.artifact is not None
    assert found.settings["graphs"]
    assert found.verdict is not None
    assert (found.verdict.padded_axes, found.verdict.max_batch_size) == (("seq",), 4)
    assert any("runs without libkpdeploy_onnx.so" in d.what for d in found.decisions)
    ops = Counter(node.op_type for node in onnx.load(found.artifact.path).graph.node)
    # What one product gave is not split for attention, but in the last layer, whose queries are of one token.
    assert (ops["JoinedAttention"], ops["Attention"], ops["Split"]) == (1, 1, 1)


def test_onnx_that_cannot_be_captured_runs_without_graphs_and_says_why(onnx_library: str, tmp_path: Path) -> None:
    of = model(Pooled())
    maker, prove = on_cpu(of, tmp_path)
    settings = {"device": "cuda", "precision": "float32"}
    way = Lowering(level=1, precision="float32", format="onnx", settings=settings)

    def captures_nothing(artifact: Any) -> Candidate:
        refused = Candidate(format="onnx", settings=artifact.settings, reason="no CUDA graph of this model: Loop")
        return refused if artifact.settings.get("graphs") else prove(artifact)

    found = maker.candidate(way, [], captures_nothing)
    assert found.passed, found.reason
    assert "graphs" not in found.settings
    assert found.decisions[0] == Skipped(what="CUDA graphs", reason="no CUDA graph of this model: Loop")
    assert found.artifact is not None
    assert not found.artifact.path.with_name("graphs.json").exists()
    # In fewer bits the same form is tried, and nothing else.
    (form,) = maker._forms(replace(way, level=2, precision="float16"), [found])
    assert form == Form(precision="float16", graphs=False)


@pytest.mark.parametrize(("precision", "level", "bound"), PRECISIONS)
def test_onnx_is_captured_and_proven_on_the_gpu(
    precision: str, level: int, bound: float, onnx_library: str, tmp_path: Path
) -> None:
    import onnxruntime

    if not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("NOT RUN: graphs of ONNX Runtime: this machine has no GPU, or no onnxruntime-gpu")
    found = onnx_candidate(tmp_path, precision, level, bound, "cuda")
    assert found.passed, found.reason
    assert found.settings["graphs"]
    assert found.verdict is not None
    assert found.verdict.padded_axes == ("seq",)


def test_where_padding_shows_the_next_form_is_tried(tmp_path: Path) -> None:
    maker, prove = on_cpu(model(Pooled(everything=True)), tmp_path)
    found = maker.candidate(WAY, [], prove)
    assert found.passed, found.reason
    assert "padding" not in found.settings
    # The form is a matter of the model, not of its precision.
    (form,) = maker._forms(replace(WAY, level=2, precision="float16"), [found])
    assert (form.precision, form.dropped) == ("float16", False)
