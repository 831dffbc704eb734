"""Every kernel of this machine against its op's float64 reference: each provider, on each way that leads to it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kpdeploy.decision import Skipped
from kpdeploy.ops import OPS, Op, libraries, providers
from kpdeploy.ops.cases import Arguments, cases_of, error, to_dtype, tolerance
from kpdeploy.progress import Progress

INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
ORT_PROVIDERS = {"cpu": ("CPUExecutionProvider",), "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider")}


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What one provider of an op did in one runtime and dtype: its worst case, by share of the tolerance.

    `error` and `tolerance` are of that case, ‖out - ref‖ / ‖ref‖; an infinite error is a NaN, a wrong shape, or a
    refusal, which `case` then tells.
    """

    op: str
    provider: str
    runtime: str
    device: str
    dtype: str
    cases: int
    error: float
    tolerance: float
    case: str

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class Report:
    """The rows of what ran, and what could not run here, with the reason."""

    checked: tuple[Checked, ...]
    skipped: tuple[Skipped, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.checked)


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to call an op: what leads to its kernels in one runtime, on one device."""

    runtime: str
    device: str
    label: str
    run: Callable[[Op, Arguments], tuple[Any, ...]]


def validate(names: Sequence[str], progress: Progress) -> Report:
    """Run all cases of the ops `names` on every way that is open here. Some ten seconds of processor time for all.

    Memory that a kernel should write holds NaN or 3.4e38 before, so that what it leaves out is seen.
    """
    from kpdeploy.ops.calls import poisoned_memory

    ways, skipped = _ways()
    checked: list[Checked] = []
    if not ways:
        return Report(checked=(), skipped=tuple(skipped))
    total = sum(len(cases_of(name)) * len(_dtypes(name)) for name in names)
    with progress.step(f"{total} calls, {len(ways)} ways", total=total) as advance, poisoned_memory():
        for name in names:
            checked += _check(OPS[name], ways, advance)
    return Report(checked=tuple(checked), skipped=tuple(skipped))


def _dtypes(name: str) -> list[str]:
    """The dtypes that some provider here takes."""
    there = [p for p in providers.PROVIDERS[name].providers if not providers.missing(p, providers.here())]
    return [dtype for dtype in providers.DTYPES.values() if any(dtype in p.dtypes for p in there)]


def _check(op: Op, ways: Sequence[Way], advance: Callable[[], None]) -> Iterator[Checked]:
    """One row for each provider, runtime and dtype that ran, from all cases of the op."""
    import torch

    from kpdeploy.ops.calls import reference

    found: dict[tuple[str, ...], Checked] = {}
    for dtype in _dtypes(op.name):
        for _, what, plain in cases_of(op.name):
            arguments = to_dtype(plain, getattr(torch, dtype), op)
            wanted: tuple[Any, ...] | None = None
            for way in ways:
                provider = providers.chosen(op.name, arguments, runtime=way.runtime, device=way.device, dtype=dtype)
                if not provider:
                    continue
                wanted = reference(op, arguments) if wanted is None else wanted
                worst, told = _run(way, op, arguments, wanted)
                key = (provider, way.runtime, way.device, dtype)
                row = Checked(
                    op=op.name,
                    provider=provider,
                    runtime=way.runtime,
                    device=way.device,
                    dtype=dtype,
                    cases=1 + (found[key].cases if key in found else 0),
                    error=worst,
                    tolerance=tolerance(provider, dtype, what),
                    case=" ".join(filter(None, (way.label, what, told))),
                )
                found[key] = _worse(found.get(key), row)
            advance()
    return iter(found.values())


def _run(way: Way, op: Op, arguments: Arguments, wanted: tuple[Any, ...]) -> tuple[float, str]:
    """The largest error of the outputs, and what was refused, if it was."""
    try:
        outs = way.run(op, arguments)
    except Exception as refused:  # torch and ONNX Runtime have classes of their own; all of them are findings
        return float("inf"), str(refused).strip().splitlines()[0]
    return max(error(out, ref) for out, ref in zip(outs, wanted, strict=True)), ""


def _worse(old: Checked | None, new: Checked) -> Checked:
    if old is None or new.error / new.tolerance >= old.error / old.tolerance:
        return new
    return replace(old, cases=new.cases)


def _ways() -> tuple[list[Way], list[Skipped]]:
    """The ways that are open here, and those that are not, with the reason."""
    at = providers.here()
    open_ways: list[Way] = []
    skipped: list[Skipped] = []
    seen = set()
    for provider in providers.OURS:
        if provider.name != "kpdeploy":
            continue
        reason = providers.missing(provider, at)
        if reason:
            skipped.append(Skipped(what=f"{provider.runtime} on {provider.device}", reason=reason))
        elif (provider.runtime, provider.device) not in seen:
            seen.add((provider.runtime, provider.device))
            open_ways += WAYS[provider.runtime](provider.device)
    return open_ways, skipped


def _torch_ways(device: str) -> Iterator[Way]:
    from kpdeploy.ops.calls import through_torch

    yield Way(runtime="torch", device=device, label="", run=lambda op, a: through_torch(op, a, device))


def _onnxruntime_ways(device: str) -> Iterator[Way]:
    """Weights as inputs, and as constants, which the kernels lay out beforehand."""
    from kpdeploy.ops.calls import onnx_model, onnx_session, through_onnxruntime

    library = str(libraries.find(libraries.ONNX))

    def run(op: Op, arguments: Arguments, constant: bool) -> tuple[Any, ...]:
        model = onnx_model(op, arguments, constant=constant)
        return through_onnxruntime(op, arguments, onnx_session(model, library, ORT_PROVIDERS[device]))

    yield Way(runtime="onnxruntime", device=device, label="", run=lambda op, a: run(op, a, False))
    yield Way(runtime="onnxruntime", device=device, label="constant weights,", run=lambda op, a: run(op, a, True))


def _numpy_ways(device: str) -> Iterator[Way]:
    """Every instruction set that this CPU has."""
    from kpdeploy.ops.calls import direct

    core = importlib.import_module("kpdeploy._core")
    best = core.isa()

    def run(isa: str, op: Op, arguments: Arguments) -> tuple[Any, ...]:
        core.use_isa(isa)
        try:
            return direct(op, arguments, threads=2)
        finally:
            core.use_isa(best)

    for isa in INSTRUCTION_SETS:
        try:
            core.use_isa(isa)
        except ValueError:
            continue
        finally:
            core.use_isa(best)
        yield Way(runtime="numpy", device=device, label=f"{isa},", run=functools.partial(run, isa))


WAYS: dict[str, Callable[[str], Iterator[Way]]] = {
    "torch": _torch_ways,
    "onnxruntime": _onnxruntime_ways,
    "numpy": _numpy_ways,
}
