"""TorchScript, written from the exported graph.

Tracing would bake the sizes in, and scripting fails on most models' Python. Here each node of the exported graph
becomes one line of TorchScript source that calls the same operator, so that dynamic axes and custom ops survive.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpdeploy.errors import ExportFailed

if TYPE_CHECKING:
    import torch

    from kpdeploy.export.capture import Capture


def export(capture: Capture, folder: Path) -> None:
    """Write model.pt into `folder`: a frozen module that takes the signature's inputs by position and name."""
    import torch

    from kpdeploy.export.capture import quiet, reason

    target = folder / "model.pt"
    if capture.model.kind == "torchscript":
        assert capture.model.module is not None
        with quiet():
            torch.jit.script(capture.model.module.module).save(str(target))
        return
    program = capture.program
    try:
        with quiet(), torch.no_grad():
            module = scripted(program, [spec.name for spec in capture.signature.inputs])
            torch.jit.freeze(module).save(str(target))
    except ExportFailed:
        raise
    except Exception as error:
        raise ExportFailed(
            f"{capture.model.name} cannot be written as TorchScript",
            why=reason(error),
            next_step="try another format: --format onnx, openvino or pt2",
        ) from None


def scripted(program: torch.export.ExportedProgram, input_names: list[str]) -> torch.jit.ScriptModule:
    """The program as a ScriptModule whose forward takes `input_names` and returns a tuple of tensors."""
    import torch

    # TorchScript knows classes by name and members: one of its own keeps two exports in a process apart.
    holder: torch.nn.Module = type("Exported", (torch.nn.Module,), {})()
    source = _Source(program, holder, input_names).text()
    module: torch.jit.ScriptModule = torch.jit.script(holder.eval())
    module.define(source)
    return module


class _Source:
    """TorchScript source of a graph, and the tensors that it needs as attributes of the module."""

    def __init__(self, program: torch.export.ExportedProgram, module: Any, input_names: list[str]) -> None:
        self.program = program
        self.module = module
        self.arguments = [_identifier(name) for name in input_names]
        self.names: dict[Any, str] = {}
        self.lines: list[str] = []
        self.taken: set[str] = set(self.arguments)

    def text(self) -> str:
        mutated = self.program.graph_signature.buffers_to_mutate or self.program.graph_signature.user_inputs_to_mutate
        if mutated:
            raise ExportFailed(
                f"the model changes its own state ({', '.join(mutated.values())}) when it is called",
                next_step="make forward() leave buffers and inputs as they are",
            )
        arguments = iter(self.arguments)
        held = self._held_tensors()
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.names[node] = self._attribute(node.name, held[node.name]) if node.name in held else next(arguments)
        returned = self._emit_graph(self.program.graph_module, self.program.graph)
        results = ", ".join(f"{value}" for value in returned)
        # Types are stated for the results alone: every argument is a Tensor by default.
        body = "\n".join(f"    {line}" for line in self.lines)
        return f"def forward(self, {', '.join(self.arguments)}):\n{body}\n    return ({results},)\n"

    def _held_tensors(self) -> dict[str, Any]:
        """Parameters, buffers and constants by the name of their placeholder."""
        signature, program = self.program.graph_signature, self.program
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        tensors = {node: program.state_dict.get(name, program.constants.get(name)) for node, name in held.items()}
        constants = signature.inputs_to_lifted_tensor_constants
        return {**tensors, **{node: program.constants[name] for node, name in constants.items()}}

    def _attribute(self, name: str, tensor: Any) -> str:
        attribute = self._fresh(f"w_{name}")
        self.module.register_buffer(attribute, tensor.detach().contiguous())
        return f"self.{attribute}"

    def _fresh(self, name: str) -> str:
        name = _identifier(name)
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def _emit_graph(self, owner: Any, graph: Any) -> list[str]:
        """Emit all nodes; the expressions of the graph's outputs."""
        for node in graph.nodes:
            if node.op == "get_attr":
                found = operator.attrgetter(node.target)(owner)
                if not hasattr(found, "graph"):
                    self.names[node] = self._attribute(node.name, found)
            elif node.op == "call_function":
                self._emit_call(owner, node)
            elif node.op == "output":
                outputs = node.args[0]
                return [self._value(v) for v in (outputs if isinstance(outputs, (tuple, list)) else (outputs,))]
        return []

    def _emit_call(self, owner: Any, node: Any) -> None:
        target = node.target
        name = getattr(target, "__name__", str(target))
        if name.split(".")[0] in _ASSERTIONS:
            return
        if name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            self._inline(owner, node, name)
            return
        expression = self._expression(node)
        self.names[node] = self._fresh(node.name)
        self.lines.append(f"{self.names[node]} = {expression}")

    def _inline(self, owner: Any, node: Any, name: str) -> None:
        """Emit the body of a region in place: gradients are off here, and autocast must be."""
        position = 1 if name == "wrap_with_set_grad_enabled" else 4
        if name == "wrap_with_autocast" and node.args[2]:
            raise ExportFailed("the model turns autocast on inside forward()", next_step="cast its weights instead")
        body = operator.attrgetter(node.args[position].target)(owner)
        inner = [n for n in body.graph.nodes if n.op == "placeholder"]
        for placeholder, argument in zip(inner, node.args[position + 1 :], strict=True):
            self.names[placeholder] = self._value(argument)
        results = self._emit_graph(body, body.graph)
        self.names[node] = f"({', '.join(results)},)"

    def _expression(self, node: Any) -> str:
        import torch

        target, args = node.target, node.args
        if target is operator.getitem:
            return f"{self._value(args[0])}[{args[1]}]"
        if target is torch.ops.aten.sym_size.int:
            return f"{self._value(args[0])}.size({args[1]})"
        if target is torch.ops.aten.sym_numel.default:
            return f"{self._value(args[0])}.numel()"
        if isinstance(target, torch._ops.OpOverload):
            return self._operator(target, args, node.kwargs)
        symbolic = _SYMBOLIC.get(target) or _SYMBOLIC.get(getattr(target, "__name__", ""))
        if symbolic is None:
            raise ExportFailed(
                f"TorchScript has no form of {getattr(target, '__name__', target)} here",
                next_step="try another format: --format onnx, openvino or pt2",
            )
        return symbolic(*(self._value(a) for a in args))

    def _operator(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        schema = target._schema
        types = {argument.name: argument.type for argument in schema.arguments}
        given = [self._typed(value, argument.type) for value, argument in zip(args, schema.arguments, strict=False)]
        given += [f"{name}={self._typed(value, types[name])}" for name, value in kwargs.items()]
        space, _, name = schema.name.partition("::")
        return f"torch.ops.{space}.{name}({', '.join(given)})"

    def _typed(self, value: Any, kind: Any) -> str:
        """A value where the operator's schema wants `kind`: an empty list needs its type said."""
        if isinstance(value, (list, tuple)) and len(value) == 0:
            return f"torch.jit.annotate({kind.annotation_str}, [])"
        if isinstance(value, (list, tuple)) and any(v is None for v in value):
            return f"torch.jit.annotate(List[Optional[Tensor]], [{', '.join(self._value(v) for v in value)}])"
        if kind.annotation_str in ("float", "Optional[float]") and isinstance(value, int):
            return self._value(float(value))
        return self._value(value)

    def _value(self, value: Any) -> str:
        import torch

        if isinstance(value, torch.fx.Node):
            return self.names[value]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(self._value, value))}]"
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return str(value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return repr(value)
        raise ExportFailed(f"TorchScript has no literal for {type(value).__name__} {value!r}")


_ASSERTIONS = {
    "_assert_scalar",
    "_assert_tensor_metadata",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
    "_guards_fn",
}


def _binary(sign: str) -> Callable[[str, str], str]:
    return lambda a, b: f"({a} {sign} {b})"


_SYMBOLIC: dict[Any, Callable[..., str]] = {
    operator.add: _binary("+"),
    operator.sub: _binary("-"),
    operator.mul: _binary("*"),
    operator.floordiv: _binary("//"),
    operator.truediv: _binary("/"),
    operator.mod: _binary("%"),
    operator.pow: _binary("**"),
    operator.eq: _binary("=="),
    operator.ne: _binary("!="),
    operator.lt: _binary("<"),
    operator.le: _binary("<="),
    operator.gt: _binary(">"),
    operator.ge: _binary(">="),
    operator.and_: _binary("and"),
    operator.or_: _binary("or"),
    operator.neg: lambda a: f"(-{a})",
    "sym_max": lambda a, b: f"max({a}, {b})",
    "sym_min": lambda a, b: f"min({a}, {b})",
    "sym_not": lambda a: f"(not {a})",
    "sym_float": lambda a: f"float({a})",
    "sym_int": lambda a: f"int({a})",
    "sym_ite": lambda c, a, b: f"({a} if {c} else {b})",
    "ceil": lambda a: f"int(math.ceil({a}))",
    "floor": lambda a: f"int(math.floor({a}))",
    "trunc": lambda a: f"int({a})",
    "round": lambda a: f"int(round({a}))",
}
"""Arithmetic on sizes, by function or by its name."""


def _identifier(name: str) -> str:
    name = re.sub(r"\W", "_", name)
    return f"{name}_" if keyword.iskeyword(name) or name[:1].isdigit() or name == "self" else name
