"""`kpdeploy ops`, `kpdeploy ops explain` and `kpdeploy ops validate`"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from kpdeploy.cli import NearCommands
from kpdeploy.errors import KernelsDiffer, KernelsMissing, UnknownName, did_you_mean
from kpdeploy.ops import measured, measured_attention, providers
from kpdeploy.ops.linear_activation import ACTIVATIONS

if TYPE_CHECKING:
    from kpdeploy.decision import Decision
    from kpdeploy.ops.validate import Checked

EPILOG = """\b
Examples:
  kpdeploy ops
  kpdeploy ops explain linear_activation --device cpu --dtype f32 --shape 1024x384x1536
  kpdeploy ops validate
"""

SHAPES = "\n".join(
    f"  {name:18} {' x '.join(row.dims.names):40} {row.dims.example}" for name, row in providers.PROVIDERS.items()
)

EXPLAIN_EPILOG = f"""\b
Shapes, all leading dims of x counted as rows:
{SHAPES}

\b
Examples:
  kpdeploy ops explain linear_activation --device cpu --dtype f32 --shape 1024x384x1536
  kpdeploy ops explain attention --dtype bf16 --shape 8x128x128x12x32 --json
  kpdeploy ops explain attention --device cuda --dtype bf16 --shape 4x2048x2048x16x256 --causal
  kpdeploy ops explain linear_activation --device cuda --dtype bf16 --activation gelu_tanh --shape 4096x1024x4096
"""

VALIDATE_EPILOG = """\b
Examples:
  kpdeploy ops validate
  kpdeploy ops validate attention rms_norm --json
"""


@click.group(cls=NearCommands, invoke_without_command=True, epilog=EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the fused ops, who runs them, and whether that is here.

    A provider is one implementation of an op. The first one that is there and takes the call runs it.
    """
    if ctx.invoked_subcommand is None:
        _list(as_json)
    elif as_json:
        defaults = ctx.default_map or {}
        own = {**defaults.get(ctx.invoked_subcommand, {}), "as_json": True}
        ctx.default_map = {**defaults, ctx.invoked_subcommand: own}


def _list(as_json: bool) -> None:
    from kpdeploy.cli import console

    at = providers.here()
    if as_json:
        rows = [_provider_json(op, p, at) for op, row in providers.PROVIDERS.items() for p in row.providers]
        console.print_json({"providers": rows, "machine": [_need_json(need, at[need]) for need in at]})
        return
    console.table(("op", "in", *providers.DEVICES), list(_op_rows(at)))
    console.out.print(
        "[dim]The first provider that is here and takes the call runs it; those in brackets are not.[/]\n"
    )
    console.table(("provider", "in", "dtypes", "runs"), list(_provider_rows()))
    console.out.print()
    needs = [_need_json(need, at[need]) for need in at if not need.startswith("no ")]
    console.table(("needed", "here", ""), [(n["need"], "yes" if n["here"] else "no", n["told"]) for n in needs])
    console.next_command("kpdeploy ops validate")


def _op_rows(at: Mapping[str, Decision]) -> Iterable[tuple[str, ...]]:
    """Op, runtime, and for each device the names of the providers, in brackets where they are not here."""
    for op, row in providers.PROVIDERS.items():
        for index, runtime in enumerate(providers.RUNTIMES):
            cells = []
            for device in providers.DEVICES:
                found = [p for p in row.providers if (p.runtime, p.device) == (runtime, device)]
                cells.append(", ".join(f"({p.name})" if providers.missing(p, at) else p.name for p in found))
            yield ("" if index else op), runtime, *cells


def _provider_rows() -> Iterable[tuple[str, ...]]:
    """Each provider once, however many ops it has."""
    seen: dict[tuple[str, str], providers.Provider] = {}
    for row in providers.PROVIDERS.values():
        for p in row.providers:
            seen.setdefault((p.name, _place(p)), p)
    for p in seen.values():
        yield p.name, _place(p), " ".join(_short(d) for d in p.dtypes), p.when


def _place(p: providers.Provider | Checked) -> str:
    return p.runtime if p.device == "cpu" else f"{p.runtime} {p.device}"


def _need_json(need: str, decision: Decision) -> dict[str, Any]:
    from kpdeploy.decision import Applied

    found = isinstance(decision, Applied)
    told = decision.detail if isinstance(decision, Applied) else decision.reason
    return {"need": need, "here": found, "told": told}


def _short(dtype: str) -> str:
    return next(short for short, name in providers.DTYPES.items() if name == dtype)


def _provider_json(op: str, p: providers.Provider, at: Mapping[str, Decision]) -> dict[str, Any]:
    reason = providers.missing(p, at)
    return {
        "op": op,
        "provider": p.name,
        "runtime": p.runtime,
        "device": p.device,
        "dtypes": p.dtypes,
        "library": p.library,
        "needs": p.needs,
        "when": p.when,
        "here": not reason,
        "reason": reason,
    }


@command.command(epilog=EXPLAIN_EPILOG)
@click.argument("op")
@click.option("--device", default="cpu", show_default=True, help=f"One of {', '.join(providers.DEVICES)}.")
@click.option("--dtype", default="f32", show_default=True, help=f"One of {', '.join(providers.DTYPES)}.")
@click.option("--activation", default="gelu", show_default=True, help="Of linear_activation.")
@click.option("--kv-heads", default=0, metavar="N", help="Heads of keys of attention.  [default: as many as heads]")
@click.option("--causal", is_flag=True, help="Of attention: queries see no later keys.")
@click.option("--lengths", is_flag=True, help="Of attention: each row has its own number of keys.")
@click.option("--shape", required=True, metavar="AxBx…", help="The sizes of the call, as listed below.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(
    op: str,
    device: str,
    dtype: str,
    activation: str,
    kv_heads: int,
    causal: bool,
    lengths: bool,
    shape: str,
    as_json: bool,
) -> None:
    """Say who would run a call of OP here, and why the others would not."""
    from kpdeploy.cli import console

    op = _known("op", op.replace("-", "_"), providers.PROVIDERS)
    device = _known("device", device, providers.DEVICES)
    dtype = _known("dtype", dtype, {**providers.DTYPES, **{name: name for name in providers.DTYPES.values()}})
    dtype = providers.DTYPES.get(dtype, dtype)
    activation = _known("activation", activation, ACTIVATIONS)
    sizes = providers.parse_shape(op, shape)
    answers = providers.explain(
        op,
        device=device,
        dtype=dtype,
        sizes=sizes,
        at=providers.here(),
        activation=activation,
        kv_heads=kv_heads,
        causal=causal,
        lengths=lengths,
    )
    elsewhere = measured.of(op, dtype, activation, tuple(sizes.values())) if device == "cuda" else []
    attentions = measured_attention.of(dtype, tuple(sizes.values())) if (op, device) == ("attention", "cuda") else []
    if as_json:
        call = {"op": op, "device": device, "dtype": dtype, "sizes": sizes}
        runs = {r: next((a.provider.name for a in answers if _runs(a, r)), None) for r in providers.RUNTIMES}
        told = [
            {"provider": a.provider.name, "runtime": a.provider.runtime, "device": a.provider.device}
            | {"library": a.provider.library, "runs": a.runs, "why": a.why}
            for a in answers
        ]
        figures = [asdict(row) | {"us": dict(row.us)} for row in elsewhere] + [asdict(row) for row in attentions]
        console.print_json({**call, "runs": runs, "providers": told, "measured": figures})
        return
    said = ", ".join(f"{size} {name}" for name, size in sizes.items())
    console.out.print(f"{op}: {said}; {dtype} on {device}\n")
    rows = [
        (_place(a.provider), a.provider.name, "runs" if a.runs else "", a.why)
        for runtime in providers.RUNTIMES
        for a in answers
        if a.provider.runtime == runtime
    ]
    console.table(("in", "provider", "", "why"), rows)
    for runtime in dict.fromkeys(a.provider.runtime for a in answers if a.provider.device == device):
        if not any(_runs(a, runtime) for a in answers):
            console.err.print(f"in {runtime} nothing runs this call: it ends in an error")
    for row in elsewhere:
        console.out.print(f"{row.told}: {row.provider} runs it there", markup=False)
    for attention in attentions:
        console.out.print(f"{attention.told}: {attention.provider} runs it there", markup=False)
    console.next_command(f"kpdeploy ops validate {op}")


def _runs(answer: providers.Answer, runtime: str) -> bool:
    return answer.runs and answer.provider.runtime == runtime


def _known(kind: str, given: str, known: Iterable[str]) -> str:
    """The name itself, if it is known; upper case is forgiven."""
    names = list(known)
    if given.lower() in names:
        return given.lower()
    raise UnknownName(
        f"unknown {kind} {given!r}",
        why=did_you_mean(given.lower(), names),
        next_step=f"use one of {', '.join(names)}",
    )


@command.command(epilog=VALIDATE_EPILOG)
@click.argument("ops", nargs=-1, metavar="[OP]...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def validate(ops: tuple[str, ...], as_json: bool) -> None:
    """Run every kernel of this machine against its op's plain-torch reference in float64.

    Odd and zero sizes, one row, large, strided and broadcast tensors, each in every dtype, through torch, through ONNX
    Runtime (weights as inputs, and as constants) and on NumPy arrays with every instruction set that this CPU has.
    Outputs lie in memory that held NaN or 3.4e38. Shown is the worst case of each, ‖out - ref‖ / ‖ref‖.
    """
    from kpdeploy.cli import console

    names = [_known("op", op.replace("-", "_"), providers.PROVIDERS) for op in ops] or list(providers.PROVIDERS)
    names = list(dict.fromkeys(names))
    _needs_torch()
    from kpdeploy.ops.validate import validate as run

    report = run(names, console.progress(json_output=as_json))
    failed = [row for row in report.checked if not row.passed]
    if not report.checked:
        raise KernelsMissing(
            "there is no kernel here to validate",
            why="; ".join(dict.fromkeys(skipped.reason for skipped in report.skipped)),
            next_step="see csrc/BUILD.md, then kpdeploy ops",
        )
    if as_json:
        skipped = [asdict(entry) for entry in report.skipped]
        rows = [{**asdict(row), "passed": row.passed} for row in report.checked]
        console.print_json({"passed": report.passed, "checked": rows, "skipped": skipped})
        if failed:
            click.get_current_context().exit(KernelsDiffer.exit_code)
        return
    _show(report.checked)
    for entry in report.skipped:
        console.err.print(f"not run: {entry.what}: {entry.reason}")
    if failed:
        raise KernelsDiffer(
            f"{len(failed)} of {len(report.checked)} kernels differ from their reference",
            why=f"{failed[0].op} by {failed[0].provider} in {failed[0].runtime}: {failed[0].case}",
            next_step="rebuild the kernels (csrc/BUILD.md); if it stays, report it with `kpdeploy ops validate --json`",
        )
    console.next_command("kpdeploy export minilm --target triton --repo models/")


def _needs_torch() -> None:
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        raise KernelsMissing(
            "the kernels cannot be validated", why="torch, which computes the references, is not installed",
            next_step="pip install torch",
        )  # fmt: skip


def _show(rows: Iterable[Checked]) -> None:
    from kpdeploy.cli import console

    columns = ("op", "in", "provider", "dtype", "cases", "error", "allowed", "")
    drawn = []
    for r in rows:
        measured = (r.cases, f"{r.error:.1e}", f"{r.tolerance:.1e}")
        drawn.append((r.op, _place(r), r.provider, _short(r.dtype), *measured, console.mark(r.passed)))
    console.table(columns, drawn)
    for r in rows:
        if not r.passed:
            console.out.print(f"{r.op} in {r.runtime}, {_short(r.dtype)}: {r.case}", markup=False)
