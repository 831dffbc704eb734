"""Small models that are awkward in one way each, through every format that needs no compiler."""
# ruff: noqa: E402  (what needs torch is imported after it was found to be there)

import importlib.util
from collections.abc import Callable

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for package in ("onnx", "onnxruntime", "onnxscript", "openvino"):
    pytest.importorskip(package)

from torch import nn

from kpdeploy.compare import TOLERANCES, compare
from kpdeploy.errors import KpdeployError
from kpdeploy.export import FORMATS, Capture
from kpdeploy.export.capture import settle_axes
from kpdeploy.inputs import proof_points, sample
from kpdeploy.load import Request
from kpdeploy.load.factory import from_module
from kpdeploy.load.reference import reference
from kpdeploy.model import Model
from kpdeploy.runtimes import source

QUICK = ("onnx", "openvino", "torchscript")


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.skip = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        return torch.relu_(self.body(x) + self.skip(x))


def resnet() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    net = nn.Sequential(stem, Block(8, 8, 1), Block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x):
        out, (hidden, cell) = self.lstm(x)
        return {"out": out, "hidden": hidden.transpose(0, 1), "cell": cell.transpose(0, 1)}


class PassedThrough(nn.Module):
    def forward(self, x, mask):
        return {"y": x * 2, "mask": mask, "again": x}


class NoBatch(nn.Module):
    def forward(self, a, b):
        return a @ b


class Counts(nn.Module):
    def forward(self, ids):
        return {"sum": ids.sum(-1, dtype=torch.int32), "next": ids + 1, "wide": ids.cumsum(-1)}


class Flags(nn.Module):
    def forward(self, x):
        return {"positive": x > 0, "any": (x > 1).any(-1), "not": ~(x > 0)}


class Scalar(nn.Module):
    def forward(self, x):
        return {"mean": x.mean(), "x": x + 1, "count": torch.tensor(3)}


class Tied(nn.Module):
    """Two outputs that are one tensor."""

    def forward(self, x):
        y = x.exp()
        return {"one": y, "two": y, "rows": y[:, 0]}


class Regions(nn.Module):
    """Gradients off inside, autocast off inside, as rotary embeddings and norms have it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            angle = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * 0.1
        with torch.autocast("cpu", enabled=False):
            turned = (x.float() * angle.cos()).sum(-1, keepdim=True)
        return self.linear(x) + turned


class Sizes(nn.Module):
    """Arithmetic on sizes: halves, padding up to a multiple, and a slice that ends before the end."""

    def forward(self, x):
        batch, length, width = x.shape
        padded = nn.functional.pad(x, (0, 0, 0, (8 - length % 8) % 8))
        blocks = padded.reshape(batch, -1, 8, width).mean(2)
        return {"blocks": blocks, "half": x[:, : (length + 1) // 2], "scaled": x / length**0.5}


class Spectrum(nn.Module):
    """Complex numbers inside."""

    def forward(self, x):
        return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real


class Indexed(nn.Module):
    """Advanced indexing with holes, masked fill with infinity, boolean arithmetic."""

    def forward(self, x):
        index = torch.arange(x.shape[-1] - 1, -1, -1)
        turned = x[:, :, index]
        held = turned.masked_fill(turned < 0, float("-inf"))
        return torch.where(torch.isinf(held), torch.zeros_like(held), held)


class Cache(nn.Module):
    """Writes to a buffer that does not change the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x):
        self.last.copy_(torch.full((3,), 2.0))
        return x * self.last


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 8)

    def forward(self, ids):
        return self.linear(self.norm(self.table(ids))).softmax(-1)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "resnet": (resnet, ["image:float32[batch=1..4,3,32,40]"]),
    "lstm": (Recurrent, ["x:float32[batch=1..4,seq=1..9,6]"]),
    "passed through": (PassedThrough, ["x:float32[batch=1..4,3]", "mask:int64[batch,seq=1..7]"]),
    "no batch": (NoBatch, ["a:float32[3,4]", "b:float32[4,5]"]),
    "int32": (Counts, ["ids:int32[batch=1..4,seq=1..7]{0..90}"]),
    "bool": (Flags, ["x:float32[batch=1..4,6]"]),
    "0-d": (Scalar, ["x:float32[batch=1..4,6]"]),
    "tied": (Tied, ["x:float32[batch=1..4,6]"]),
    "regions": (Regions, ["x:float32[batch=1..4,seq=1..9,4]"]),
    "sizes": (Sizes, ["x:float32[batch=1..4,seq=1..30,4]"]),
    "complex": (Spectrum, ["x:float32[batch=1..4,8,6]"]),
    "indexed": (Indexed, ["x:float32[batch=1..4,2,7]"]),
    "buffer": (Cache, ["x:float32[batch=1..4,3]"]),
    "float16": (lambda: Lookup().half(), ["ids:int64[batch=1..4,seq=1..7]"]),
    "bfloat16": (lambda: Lookup().bfloat16(), ["ids:int64[batch=1..4,seq=1..7]"]),
    "float64": (lambda: Lookup().double(), ["ids:int64[batch=1..4,seq=1..7]"]),
}


def load(build: Callable[[], nn.Module], inputs: list[str]) -> Model:
    torch.manual_seed(3)
    request = Request(inputs=inputs, max_batch=4)
    return settle_axes(from_module(build(), None, request, name="small", source={"kind": "test"}), stated=False)


def runtime(name: str):
    spec = importlib.util.spec_from_file_location(f"runtime_{name}", source(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def worst_errors(model: Model, format: str, folder) -> dict[str, tuple[float, float]]:
    """Export, load the file, and compare at all proof points: (error, tolerance) by output."""
    made = folder / "made"
    made.mkdir()
    FORMATS[format].export(Capture(model, folder), made)
    inputs, outputs = ([s.name for s in specs] for specs in (model.signature.inputs, model.signature.outputs))
    run = runtime(format).load(
        str(made / FORMATS[format].filename), inputs=inputs, outputs=outputs, settings={"threads": 1}
    )
    answer, rng = reference(model), np.random.default_rng(5)
    worst: dict[str, tuple[float, float]] = {}
    for point in proof_points(model.signature, rng):
        arrays = sample(model.signature, point, rng)
        out = dict(zip(outputs, run([arrays[name] for name in inputs]), strict=True))
        for c in compare(out, answer(arrays), TOLERANCES):
            worst[c.output] = max(worst.get(c.output, (0.0, 0.0)), (c.error, c.tolerance))
    return worst


REFUSED = {("float64", "openvino")}
"""What a format says beforehand that it cannot compute."""

WRONG = {("complex", "openvino")}
"""What only the proof finds: OpenVINO misreads ONNX's DFT."""

BFLOAT16 = 1.6e-2
"""Twice bfloat16's epsilon: ONNX and OpenVINO compute in float32, so the reference is what rounds."""


@pytest.mark.parametrize("format", QUICK)
@pytest.mark.parametrize("name", MODELS)
def test_an_awkward_model_gives_its_own_answers(name, format, tmp_path):
    if (name, format) in REFUSED:
        with pytest.raises(KpdeployError) as refused:
            worst_errors(load(*MODELS[name]), format, tmp_path)
        assert refused.value.what
        assert refused.value.next_step
        return
    worst = worst_errors(load(*MODELS[name]), format, tmp_path)
    if (name, format) in WRONG:
        assert any(error > allowed for error, allowed in worst.values())
        return
    assert worst
    assert {
        output: error
        for output, (error, allowed) in worst.items()
        if error > max(allowed, BFLOAT16 * (name == "bfloat16"))
    } == {}


class Attention(nn.Module):
    """Local attention: a padded query far from all tokens may look at nothing."""

    def forward(self, x, mask):
        place = torch.arange(x.shape[1])
        near = (place[:, None] - place[None, :]).abs() <= 1
        allowed = near[None, None] & mask[:, None, None, :].bool()
        heads = x[:, None]
        return nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=allowed)[:, 0]


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_a_query_that_may_look_at_nothing_gets_zeros_as_in_pytorch(format, tmp_path):
    model = load(Attention, ["x:float32[batch=1..4,seq=1..16,8]", "mask:int64[batch,seq]{mask}"])
    assert all(error <= allowed for error, allowed in worst_errors(model, format, tmp_path).values())


class Shifted(nn.Module):
    """Asks whether a size is 1, where torch.export would want a range that leaves it out."""

    def forward(self, ids):
        return nn.functional.pad(ids[:, 1:], [0, 1, 0, 0], value=0.0) + ids


def test_an_axis_whose_small_sizes_torch_export_objects_to_stays_free():
    model = load(Shifted, ["ids:float32[batch=1..4,seq=1..16]"])
    assert {axis.name: (axis.min, axis.max) for axis in model.signature.axes} == {"batch": (1, 4), "seq": (1, 16)}


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x)


def test_an_axis_that_the_model_fixes_is_told():
    with pytest.raises(KpdeployError):
        load(Fixed, ["x:float32[batch=1..4,width=1..9]"])


class Strided(nn.Module):
    def forward(self, x):
        return x[:, ::4]


def test_an_output_that_follows_an_axis_by_a_stride_is_not_taken_for_fixed():
    request = Request(inputs=["x:float32[batch=1..4,samples=400..4000]"])
    model = from_module(Strided(), None, request, name="small", source={"kind": "test"})
    assert model.signature.outputs[0].shape == ("batch", -1)


def test_two_exports_in_one_process_do_not_know_each_other(tmp_path):
    for index, build in enumerate((NoBatch, NoBatch)):
        (tmp_path / str(index)).mkdir()
        worst = worst_errors(load(build, MODELS["no batch"][1]), "torchscript", tmp_path / str(index))
        assert all(error <= allowed for error, allowed in worst.values())
