"""Who runs an op: its providers, in the order in which they are preferred, and what each of them needs.

The adapters in csrc/ decide at run time; this table says what they decide, and tests/kernels/test_providers.py watches
them do it. Nothing heavy is imported before `here` looks at the machine.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kpdeploy.decision import Applied, Decision, Skipped
from kpdeploy.errors import ShapeMalformed
from kpdeploy.ops import libraries, measured, measured_attention

Sizes = Mapping[str, int]

RUNTIMES = ("torch", "onnxruntime", "numpy")
"""torch.ops.kpdeploy.*; nodes of com.kpdeploy in ONNX Runtime; kpdeploy._core on NumPy arrays."""
DEVICES = ("cpu", "cuda")
DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
"""As the command line has them, and as torch does."""

FEW_ROWS = 4
"""Up to here our own kernel reads a weight once, where it lies, which oneDNN does not beat: kFewRows of
csrc/torch/ops.cpp."""

LARGEST_HEAD = 256


LEAST_PLAIN = 768
"""Inputs and outputs of a linear without an activation from which on an export to ONNX gives it to our kernel
(benchmarks/README.md, "Products on a CPU")."""


def _takes_all(sizes: Sizes) -> str:
    return ""


def _many_rows(sizes: Sizes) -> str:
    if 0 in sizes.values():
        return "there is nothing to multiply"
    return "" if sizes["rows"] > FEW_ROWS else f"up to {FEW_ROWS} rows our own kernel is as fast"


def _no_memory(sizes: Sizes) -> str:
    return "it needs memory on the GPU, and in ONNX Runtime our ops are lent none"


def _head_fits(sizes: Sizes) -> str:
    return "" if 1 <= sizes["size"] <= LARGEST_HEAD else f"heads are of size 1 to {LARGEST_HEAD}"


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of an op on a machine.

    `gpu` is the name of its GPU, `hopper` whether our kernels for compute capability 9.0 run there; `activation` is of
    linear_activation, "" of the others; `kv_heads` (0: as many as heads), `causal` and `lengths` are of attention.
    """

    op: str
    dtype: str
    sizes: Sizes
    activation: str = ""
    gpu: str = ""
    hopper: bool = False
    kv_heads: int = 0
    causal: bool = False
    lengths: bool = False

    def measured(self) -> measured.Measured | measured_attention.Measured | None:
        """What was measured of it on this GPU."""
        shape = tuple(self.sizes.values())
        if self.op == "attention":
            return measured_attention.nearest(
                self.gpu,
                self.dtype,
                shape,
                kv_heads=self.kv_heads or self.sizes["heads"],
                causal=self.causal,
                lengths=self.lengths,
            )
        found = measured.of(self.op, self.dtype, self.activation, shape)
        return next((m for m in found if m.device == self.gpu), None)


def _takes_any(call: Call) -> str:
    return ""


CUBLASLT_ACTIVATIONS = ("none", "relu", "gelu_tanh")
"""The epilogues of cuBLASLt that csrc/core/cublaslt.cpp asks for: it has no GELU by erf, and no SiLU."""


def _cublaslt_refuses(call: Call) -> str:
    """As csrc/core/linear.cu decides."""
    known = call.measured()
    if known:
        return known.told if known.provider == "kpdeploy" else ""
    if call.activation not in CUBLASLT_ACTIVATIONS:
        return f"it has no epilogue for {call.activation}"
    if 0 in call.sizes.values():
        return "there is nothing to multiply"
    whole_rows = call.sizes["inputs"] % 8 == call.sizes["outputs"] % 8 == 0
    if call.hopper and call.dtype != "float32" and whole_rows:
        return "not measured: our kernels for compute capability 9.0 take it first"
    return "" if call.sizes["rows"] > FEW_ROWS else f"up to {FEW_ROWS} rows our own kernel is as fast"


OWN_HEAD = 128
"""The largest head of our kernels for compute capability 9.0; larger ones are cuDNN's there: kOwnHead of
csrc/core/attention.cu."""


def _cudnn_refuses(call: Call) -> str:
    """As csrc/core/attention.cu and cudnn_attention.cpp decide."""
    sizes, masks = call.sizes, call.causal and call.sizes["queries"] > 1
    if sizes["size"] % 8:
        return "it takes heads of a multiple of 8"
    if 0 in sizes.values():
        return "there is nothing to attend to"
    if call.lengths:
        return "it lets values beyond a row's length into the result, where they are NaN or infinite"
    if masks and sizes["queries"] > sizes["keys"]:
        return "it takes a causal mask where there are as many keys as queries or more"
    known = call.measured()
    if known:
        return known.told if known.provider == "kpdeploy" else ""
    if not call.hopper:
        return "not measured: our own kernel runs"
    if sizes["size"] <= OWN_HEAD:
        return "not measured: our kernels for compute capability 9.0 take it first"
    return ""


def _mlas_refuses(call: Call) -> str:
    """What is a node of ours is not ONNX Runtime's own: an export chooses (kpdeploy/optimize/linear.py)."""
    if call.activation != "none":
        return f"it has no epilogue for {call.activation}"
    if min(call.sizes["inputs"], call.sizes["outputs"]) < LEAST_PLAIN:
        return f"an export leaves it products of fewer than {LEAST_PLAIN} inputs or outputs; a node of ours runs ours"
    return f"from {LEAST_PLAIN} inputs and outputs on ours was measured to be as fast or faster"


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One implementation that may run an op.

    `library` is the file that holds it, or that calls it. `needs` are names of NEEDS; `dtype_needs` one more, by dtype.
    `when` says when it is chosen. `refuses` gives the reason for which it leaves a call of these sizes to the next one;
    empty: it takes it; `refuses_call` the same of what else is known of the call.
    """

    name: str
    runtime: str
    device: str
    dtypes: tuple[str, ...]
    library: str
    needs: tuple[str, ...]
    when: str
    refuses: Callable[[Sizes], str] = _takes_all
    refuses_call: Callable[[Call], str] = _takes_any
    dtype_needs: Mapping[str, str] = field(default_factory=dict)


# What a provider needs, and how it is known to be there: each asks the thing itself and never fails.


def _torch_library() -> Decision:
    if not _has("torch"):
        return Skipped(what=libraries.TORCH, reason="torch is not installed")
    from kpdeploy.ops.registration import register

    return register()


def _onnx_library() -> Decision:
    path = libraries.find(libraries.ONNX)
    if isinstance(path, Skipped):
        return path
    if not _has("onnxruntime"):
        return Skipped(what=libraries.ONNX, reason="onnxruntime is not installed")
    import onnxruntime

    try:
        onnxruntime.SessionOptions().register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime has a class for every status
        reason = f"ONNX Runtime {onnxruntime.__version__} does not load it: {_first_line(error)}"
        return Skipped(what=libraries.ONNX, reason=reason)
    return Applied(what=libraries.ONNX, detail=f"registered in ONNX Runtime {onnxruntime.__version__}")


def _core() -> Decision:
    try:
        core = importlib.import_module("kpdeploy._core")
    except ImportError as error:
        return Skipped(what="kpdeploy._core", reason=f"it cannot be imported ({error}): csrc/BUILD.md")
    return Applied(what="kpdeploy._core", detail=f"its kernels for {core.isa()}")


def _onednn() -> Decision:
    what = "oneDNN"
    if not _has("torch"):
        return Skipped(what=what, reason="torch is not installed")
    import ctypes
    from pathlib import Path

    import torch

    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    # The function that csrc/torch/ops.cpp looks up.
    if library.is_file() and hasattr(ctypes.CDLL(str(library)), "aoti_torch_cpu__linear_pointwise"):
        return Applied(what=what, detail=f"as torch {torch.__version__} carries it")
    return Skipped(what=what, reason=f"torch {torch.__version__} was built without it")


def _onednn_bfloat16() -> Decision:
    what = "bfloat16 in oneDNN"
    if isinstance(_onednn(), Skipped):
        return Skipped(what=what, reason="torch has no oneDNN")
    import torch

    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return Applied(what=what)
    return Skipped(what=what, reason="this CPU has no AVX-512")


def _cuda_kernels() -> Decision:
    what = "CUDA kernels"
    # The libraries are built together: one that can be loaded speaks for all.
    library, core = _torch_library(), _core()
    if isinstance(library, Applied):
        import ctypes

        built = bool(ctypes.CDLL(str(libraries.find(libraries.TORCH))).kpdeploy_torch_cuda())
    elif isinstance(core, Applied):
        built = importlib.import_module("kpdeploy._core").cuda()
    else:
        return Skipped(what=what, reason=core.reason)
    if built:
        return Applied(what=what)
    return Skipped(what=what, reason="the libraries here were built without CUDA (csrc/BUILD.md)")


def _gpu() -> Decision:
    from kpdeploy.hardware import detect

    gpus = detect().gpus
    if gpus:
        return Applied(what="NVIDIA GPU", detail=gpus[0].name)
    return Skipped(what="NVIDIA GPU", reason="this machine has no NVIDIA GPU")


def _hopper() -> Decision:
    what = "compute capability 9.0"
    from kpdeploy.hardware import detect

    gpus = detect().gpus
    if gpus and gpus[0].capability == "9.0":
        return Applied(what=what, detail=gpus[0].name)
    found = f"the GPU here has {gpus[0].capability}" if gpus else "this machine has no NVIDIA GPU"
    return Skipped(what=what, reason=found)


def _cublaslt() -> Decision:
    what = "cuBLASLt"
    import ctypes

    if _has("torch"):
        import torch  # noqa: F401 - a torch with CUDA brings it, and loads it
    for name in ("libcublasLt.so.13", "libcublasLt.so.12"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return Applied(what=what, detail=name)
    return Skipped(what=what, reason="no libcublasLt.so.13 or .12 can be loaded: our own kernels run")


CUDNN = "libcudnn.so.9"
CUDNN_BROKEN = (91000, 91001)
"""Releases whose attention cudnn-frontend refuses."""


def _cudnn() -> Decision:
    what = "cuDNN"
    import ctypes

    if _has("torch"):
        import torch  # noqa: F401 - a torch with CUDA brings it, and loads it
    try:
        version = int(ctypes.CDLL(CUDNN).cudnnGetVersion())
    except (OSError, AttributeError):
        return Skipped(what=what, reason=f"no {CUDNN} can be loaded: our own kernels run")
    if version in CUDNN_BROKEN:
        return Skipped(what=what, reason=f"attention of cuDNN {version} has known bugs: our own kernels run")
    return Applied(what=what, detail=f"{CUDNN}, version {version}")


def _torch_cuda() -> Decision:
    what = "torch with CUDA"
    if not _has("torch"):
        return Skipped(what=what, reason="torch is not installed")
    import torch

    if torch.cuda.is_available():
        return Applied(what=what, detail=f"torch {torch.__version__}")
    return Skipped(what=what, reason=f"torch {torch.__version__} sees no GPU")


def _onnxruntime_cuda() -> Decision:
    what = "ONNX Runtime with CUDA"
    if not _has("onnxruntime"):
        return Skipped(what=what, reason="onnxruntime is not installed")
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return Applied(what=what)
    return Skipped(what=what, reason="the installed onnxruntime has no CUDA provider (pip install onnxruntime-gpu)")


def _no_torch_library() -> Decision:
    what = f"no {libraries.TORCH}"
    if not _has("torch"):
        return Skipped(what=what, reason="torch is not installed")
    if isinstance(_torch_library(), Skipped):
        return Applied(what=what)
    return Skipped(what=what, reason=f"{libraries.TORCH} is here, and holds the op")


def _no_onnx_library() -> Decision:
    what = f"no {libraries.ONNX}"
    if not _has("onnxruntime"):
        return Skipped(what=what, reason="onnxruntime is not installed")
    if isinstance(_onnx_library(), Skipped):
        return Applied(what=what)
    return Skipped(what=what, reason=f"only in a session that does not register {libraries.ONNX}")


NEEDS: dict[str, Callable[[], Decision]] = {
    libraries.TORCH: _torch_library,
    libraries.ONNX: _onnx_library,
    "kpdeploy._core": _core,
    "oneDNN": _onednn,
    "bfloat16 in oneDNN": _onednn_bfloat16,
    "CUDA kernels": _cuda_kernels,
    "NVIDIA GPU": _gpu,
    "compute capability 9.0": _hopper,
    "cuBLASLt": _cublaslt,
    "cuDNN": _cudnn,
    "torch with CUDA": _torch_cuda,
    "ONNX Runtime with CUDA": _onnxruntime_cuda,
    f"no {libraries.TORCH}": _no_torch_library,
    f"no {libraries.ONNX}": _no_onnx_library,
}


@functools.cache
def here() -> Mapping[str, Decision]:
    """Each of NEEDS on this machine: Applied, or Skipped with the reason. Imports torch and onnxruntime (seconds)."""
    return {name: probe() for name, probe in NEEDS.items()}


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# The providers.

CPU_DTYPES = ("float32", "bfloat16")
GPU_DTYPES = ("float32", "bfloat16", "float16")
GPU = ("NVIDIA GPU", "CUDA kernels")


def _ours(refuses: Callable[[Sizes], str] = _takes_all) -> tuple[Provider, ...]:
    """Our own kernels in every runtime, and what stands in where their libraries are not."""
    rows = (
        ("torch", "cpu", CPU_DTYPES, libraries.TORCH, (libraries.TORCH,)),
        ("torch", "cuda", GPU_DTYPES, libraries.TORCH, (*GPU, "torch with CUDA", libraries.TORCH)),
        ("onnxruntime", "cpu", CPU_DTYPES, libraries.ONNX, (libraries.ONNX,)),
        ("onnxruntime", "cuda", GPU_DTYPES, libraries.ONNX, (*GPU, "ONNX Runtime with CUDA", libraries.ONNX)),
        ("numpy", "cpu", CPU_DTYPES, "kpdeploy/_core", ("kpdeploy._core",)),
    )
    kernels = [
        Provider(
            name="kpdeploy",
            runtime=runtime,
            device=device,
            dtypes=dtypes,
            library=library,
            needs=needs,
            when="calls that no provider before it takes",
            refuses=refuses,
        )
        for runtime, device, dtypes, library, needs in rows
    ]
    reference = Provider(
        name="reference",
        runtime="torch",
        device="cpu",
        dtypes=GPU_DTYPES,
        library="",
        needs=(f"no {libraries.TORCH}",),
        when=f"where {libraries.TORCH} is not: plain torch in float64, slow",
    )
    body = Provider(
        name="onnx_body",
        runtime="onnxruntime",
        device="cpu",
        dtypes=("float32",),
        library="",
        needs=(f"no {libraries.ONNX}",),
        when=f"in a session without {libraries.ONNX}: the function that the model carries",
    )
    return (*kernels, reference, body)


OURS = _ours()
CUBLASLT = tuple(
    Provider(
        name="cublaslt",
        runtime=runtime,
        device="cuda",
        dtypes=GPU_DTYPES,
        library=library,
        needs=(*GPU, f"{package} with CUDA", library, "cuBLASLt"),
        when="products that it was measured to make faster, and those that our kernels for 9.0 do not take",
        refuses_call=_cublaslt_refuses,
    )
    for runtime, package, library in (
        ("torch", "torch", libraries.TORCH),
        ("onnxruntime", "ONNX Runtime", libraries.ONNX),
    )
)
CUDNN_PROVIDERS = tuple(
    Provider(
        name="cudnn",
        runtime=runtime,
        device="cuda",
        dtypes=("bfloat16", "float16"),
        library=library,
        needs=(*GPU, f"{package} with CUDA", library, "cuDNN"),
        when="attention that it was measured to run faster, and heads above 128 on compute capability 9.0",
        refuses=refuses,
        refuses_call=_cudnn_refuses,
    )
    for runtime, package, library, refuses in (
        ("torch", "torch", libraries.TORCH, _head_fits),
        ("onnxruntime", "ONNX Runtime", libraries.ONNX, _no_memory),
    )
)
ONEDNN = Provider(
    name="onednn",
    runtime="torch",
    device="cpu",
    dtypes=CPU_DTYPES,
    library=libraries.TORCH,
    needs=(libraries.TORCH, "oneDNN"),
    when=f"calls of more than {FEW_ROWS} rows, where it is faster than ours",
    refuses=_many_rows,
    dtype_needs={"bfloat16": "bfloat16 in oneDNN"},
)


MLAS = Provider(
    name="mlas",
    runtime="onnxruntime",
    device="cpu",
    dtypes=("float32",),
    library="",
    needs=(),
    when="linears that an export leaves as MatMul and Add",
    refuses_call=_mlas_refuses,
)


# What a shape is, by op.


@dataclass(frozen=True, kw_only=True)
class Dims:
    """The sizes that name a call of an op, and how they are read off the call's arguments."""

    names: tuple[str, ...]
    of: Callable[..., tuple[int, ...]]
    example: str


def _rows_of(x: Any) -> int:
    return math.prod(x.shape[:-1])


ROWS = Dims(names=("rows", "width"), of=lambda x, *rest: (_rows_of(x), x.shape[-1]), example="1024x384")
LINEAR = Dims(
    names=("rows", "inputs", "outputs"),
    of=lambda x, weight, *rest: (_rows_of(x), x.shape[-1], weight.shape[0]),
    example="1024x384x1536",
)
HEADS = Dims(
    names=("batch", "queries", "keys", "heads", "size"),
    of=lambda q, k, v, lengths, heads, *rest: (*q.shape[:2], k.shape[1], heads, q.shape[2] // heads),
    example="8x128x128x12x32",
)
PACKED_HEADS = Dims(
    names=("sequences", "rows", "heads", "size"),
    of=lambda q, k, v, offsets, heads, *rest: (len(offsets) - 1, q.shape[1], heads, q.shape[2] // heads),
    example="8x1024x12x32",
)
ROTATED = Dims(
    names=("batch", "rows", "heads", "size"),
    of=lambda x, cos, sin, heads: (*x.shape[:2], heads, x.shape[2] // heads),
    example="8x128x40x64",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """An op's row: what its shape is, and its providers, the preferred ones first."""

    dims: Dims
    providers: tuple[Provider, ...]


PROVIDERS: dict[str, Row] = {
    "attention": Row(dims=HEADS, providers=(*CUDNN_PROVIDERS, *_ours(_head_fits))),
    "packed_attention": Row(dims=PACKED_HEADS, providers=_ours(_head_fits)),
    "linear_activation": Row(dims=LINEAR, providers=(ONEDNN, *CUBLASLT, *OURS, MLAS)),
    "gated_linear": Row(dims=LINEAR, providers=(ONEDNN, *OURS)),
    "layer_norm": Row(dims=ROWS, providers=OURS),
    "rms_norm": Row(dims=ROWS, providers=OURS),
    "add_layer_norm": Row(dims=ROWS, providers=OURS),
    "add_rms_norm": Row(dims=ROWS, providers=OURS),
    "rotary_embedding": Row(dims=ROTATED, providers=OURS),
}


# Asking.


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Whether a provider runs a call, and why or why not."""

    provider: Provider
    runs: bool
    why: str


def missing(provider: Provider, at: Mapping[str, Decision], dtype: str = "") -> str:
    """Why a provider is not there (for a dtype), by what `here` found; empty where it is."""
    for need in (*provider.needs, *filter(None, [provider.dtype_needs.get(dtype)])):
        decision = at[need]
        if isinstance(decision, Skipped):
            return decision.reason
    return ""


def explain(
    op: str,
    *,
    device: str,
    dtype: str,
    sizes: Sizes,
    at: Mapping[str, Decision],
    activation: str = "gelu",
    kv_heads: int = 0,
    causal: bool = False,
    lengths: bool = False,
) -> list[Answer]:
    """Each provider of the op: at most one of each runtime runs the call.

    Args:
        op, device, dtype: keys of PROVIDERS, and values of DEVICES and DTYPES.
        sizes: by the names of the op's dims.
        at: what is there; `here()` for this machine.
        activation: of linear_activation.
        kv_heads, causal, lengths: of attention; 0: as many as heads.
    """
    gpu = at["NVIDIA GPU"]
    call = Call(
        op=op,
        dtype=dtype,
        sizes=sizes,
        activation=activation if op == "linear_activation" else "",
        gpu=gpu.detail if isinstance(gpu, Applied) else "",
        hopper=isinstance(at["compute capability 9.0"], Applied),
        kv_heads=kv_heads,
        causal=causal,
        lengths=lengths,
    )
    known = call.measured() if device == "cuda" else None
    answers, taken = [], dict[str, str]()
    for provider in PROVIDERS[op].providers:
        why = _refusal(provider, device, call, at)
        if not why and provider.runtime in taken:
            why = f"{taken[provider.runtime]} takes the call first"
        runs = not why
        if runs:
            taken[provider.runtime] = provider.name
        is_measured = runs and known is not None and known.provider == provider.name
        answers.append(
            Answer(provider=provider, runs=runs, why=(known.told if known and is_measured else why) or provider.when)
        )
    return answers


def _refusal(provider: Provider, device: str, call: Call, at: Mapping[str, Decision]) -> str:
    if provider.device != device:
        return f"it is for {provider.device}"
    if call.dtype not in provider.dtypes:
        return f"it takes {', '.join(provider.dtypes)}"
    return missing(provider, at, call.dtype) or provider.refuses(call.sizes) or provider.refuses_call(call)


def chosen(op: str, arguments: tuple[Any, ...], *, runtime: str, device: str, dtype: str) -> str:
    """The name of the provider that runs a call here; empty where none does. `arguments`: of the op's torch schema."""
    dims = PROVIDERS[op].dims
    sizes = dict(zip(dims.names, dims.of(*arguments), strict=True))
    more: dict[str, Any] = {}
    if op == "linear_activation":
        more = {"activation": arguments[3]}
    elif op == "attention":
        more = {"lengths": arguments[3] is not None, "kv_heads": arguments[5], "causal": arguments[7]}
    answers = explain(op, device=device, dtype=dtype, sizes=sizes, at=here(), **more)
    return next((a.provider.name for a in answers if a.runs and a.provider.runtime == runtime), "")


def parse_shape(op: str, text: str) -> dict[str, int]:
    """The sizes of "1024x384x1536" by the names of the op's dims.

    Raises:
        ShapeMalformed: it is no list of whole numbers, or has more or fewer than the op's dims.
    """
    dims = PROVIDERS[op].dims
    said = f"the shape of {op} is {' x '.join(dims.names)}"
    parts = text.lower().replace(" ", "").split("x")
    wrong = [part for part in parts if not re.fullmatch(r"[0-9]{1,18}", part)]
    if wrong:
        why = f"{wrong[0]!r} is no size; {said}"
    elif len(parts) != len(dims.names):
        why = f"it has {len(parts)} dims; {said}"
    else:
        return dict(zip(dims.names, map(int, parts), strict=True))
    raise ShapeMalformed(f"the shape {text!r} cannot be read", why=why, next_step=f"such as --shape {dims.example}")
