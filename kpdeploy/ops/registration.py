"""Registration of the ops in torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kpdeploy.decision import Applied, Skipped
from kpdeploy.ops.op import NAMESPACE, Op

if TYPE_CHECKING:
    import torch

_held: list[torch.library.Library] = []  # a Library takes its registrations with it when it is collected


@functools.cache
def register() -> Applied | Skipped:
    """Make torch.ops.kpdeploy.* callable, with the fake kernels that torch.export needs.

    Returns Applied where the kernels run, Skipped where the float64 references stand in for them. Both give the same
    answers; the references are slow. Ops that this process holds already, from a bundle's library, stay as they are.
    """
    import torch

    from kpdeploy.ops import GPU_OPS, OPS
    from kpdeploy.ops.libraries import load_torch

    ops = [*OPS.values(), *GPU_OPS.values()]
    if all(_known(op) for op in OPS.values()):
        decision: Applied | Skipped = Applied(what="kernels", detail="a library in this process holds them already")
    else:
        decision = load_torch()
    if not all(_known(op) for op in OPS.values()):
        if isinstance(decision, Applied):
            decision = Skipped(what=decision.what, reason=f"{decision.detail} did not register its ops")
        _register_references(ops)
    for op in filter(_known, ops):  # a library of an older bundle may lack some
        torch.library.register_fake(op.qualified, _on_one_device(op))
    return decision


def _on_one_device(op: Op) -> Callable[..., Any]:
    """The op's fake, which torch also calls where one tensor of several is on the meta device: it must not then answer
    with memory that nothing was written to."""
    import torch

    @functools.wraps(op.fake)
    def fake(*arguments: Any) -> Any:
        devices = {str(a.device) for a in arguments if isinstance(a, torch.Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{op.qualified}: its tensors are on {' and '.join(sorted(devices))}")
        return op.fake(*arguments)

    return fake


def _known(op: Op) -> bool:
    import torch

    return hasattr(getattr(torch.ops, NAMESPACE), op.name)


def _register_references(ops: list[Op]) -> None:
    import torch

    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    _held.append(library)
    for op in ops:
        if not _known(op):
            library.define(op.schema)
            # Explicit: an implicit one would be taken apart by torch.export, and the op lost.
            library.impl(op.name, op.reference, "CompositeExplicitAutograd")
