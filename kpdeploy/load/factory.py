"""MODEL as `package.module:factory`: a callable that returns a module, or a module and its example inputs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kpdeploy.decision import Decision, Skipped
from kpdeploy.errors import (
    FactoryFailed,
    FactoryReturned,
    InputMismatch,
    ModelNotFound,
    ModelRejectsInputs,
    did_you_mean,
)
from kpdeploy.inputs import Array
from kpdeploy.load import Request, model_name
from kpdeploy.load.describe import (
    example_from_npz,
    forward_names,
    model_from_module,
    require_inputs,
    signature_from_example,
)
from kpdeploy.model import Model
from kpdeploy.signature import Signature, parse_inputs


def load(argument: str, request: Request) -> Model:
    module_name, _, attribute = argument.partition(":")
    made = _call(_find(module_name, attribute), argument)
    module, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, torch.nn.Module):
        raise FactoryReturned(
            f"{argument} returned a {type(module).__name__}",
            why="a factory returns a torch.nn.Module, or a tuple of a module and its example inputs",
            next_step=f"change {attribute}() to return one of the two",
        )
    return from_module(module, example, request, name=attribute, source={"kind": "factory", "factory": argument})


def from_module(
    module: torch.nn.Module,
    example: Any,
    request: Request,
    *,
    name: str,
    source: Mapping[str, Any],
    signature: Signature | None = None,
) -> Model:
    """A Model of a module: its inputs from --input, --example, `signature` or the example, whichever is there first."""
    shown: Mapping[str, Array] | None = None
    if request.inputs:
        signature = parse_inputs(request.inputs)
    elif request.example is not None:
        shown = example_from_npz(request.example)
    elif signature is None and example is not None:
        shown = _named(module, example)
    elif signature is None:
        raise require_inputs(module)
    if shown is not None:
        signature = signature_from_example(shown, max_batch=request.max_batch)
    assert signature is not None
    names = [spec.name for spec in signature.inputs]
    keywords = set(names) <= set(forward_names(module, len(names))) or _takes_keywords(module, names)
    if not keywords and not _takes(module, len(names)):
        raise InputMismatch(
            f"the model does not take {len(names)} inputs named {', '.join(names)}",
            why=f"forward() takes ({', '.join(_parameters(module))})",
            next_step="give the inputs the names of forward's parameters",
        )

    def described(signature: Signature, *decisions: Decision) -> Model:
        called = model_name(request.name or name)
        return model_from_module(module, signature, name=called, source=source, keywords=keywords, decisions=decisions)

    try:
        return described(signature)
    except ModelRejectsInputs as error:
        # That the first axis is a batch was assumed from the example; the example's own sizes must do.
        if shown is None or not signature.axes:
            raise
        skipped = Skipped(what="dynamic axis batch", reason=f"the model takes the example's sizes only ({error.why})")
        return described(signature_from_example(shown, max_batch=1), skipped)


def _find(module_name: str, attribute: str) -> Any:
    # A command line has no module of its own: names are looked up from where the user stands, as with `python -m`.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise ModelNotFound(
                f"there is no module {module_name!r}",
                why=f"looked in {os.getcwd()} and the installed packages",
                next_step="write package.module:factory, and run kpdeploy from the folder that holds the package",
            ) from None
        raise FactoryFailed(
            f"importing {module_name} failed",
            why=f"ModuleNotFoundError: {error}",
            next_step=f"pip install what is missing ({error.name})",
        ) from None
    except (Exception, SystemExit) as error:
        raise FactoryFailed(
            f"importing {module_name} failed",
            why=_one_line(error),
            next_step=f"run `python -c 'import {module_name}'` to see the whole error",
        ) from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ModelNotFound(
                f"{module_name} has no {attribute!r}",
                why=did_you_mean(part, dir(found), otherwise=f"looked in {getattr(found, '__file__', module_name)}"),
                next_step="MODEL = package.module:factory names a callable that returns a torch.nn.Module",
            )
        found = getattr(found, part)
    return found


def _call(factory: Any, argument: str) -> Any:
    if isinstance(factory, torch.nn.Module):
        return factory
    if not callable(factory):
        raise FactoryReturned(
            f"{argument} is a {type(factory).__name__}, which cannot be called",
            next_step="name a callable that returns a torch.nn.Module",
        )
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise FactoryFailed(
            f"{argument}() raised",
            why=_one_line(error),
            next_step=f"run `python -c 'from {argument.replace(':', ' import ')} as f; f()'` to see the whole error",
        ) from None


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _named(module: torch.nn.Module, example: Any) -> dict[str, Array]:
    """Example inputs (a tensor, a sequence, or a mapping by name) as arrays by name."""
    if isinstance(example, torch.Tensor):
        example = (example,)
    if isinstance(example, Sequence):
        example = dict(zip(forward_names(module, len(example)), example, strict=True))
    if not isinstance(example, Mapping) or not all(isinstance(t, torch.Tensor) for t in example.values()):
        raise FactoryReturned(
            "the factory's example inputs are not tensors",
            why="they are a tensor, a sequence of tensors, or a dict of tensors by name",
            next_step="return (module, {'input_name': tensor, …})",
        )
    return {
        name: tensor.detach().cpu().float().numpy() if tensor.dtype is torch.bfloat16 else tensor.detach().cpu().numpy()
        for name, tensor in example.items()
    }


def _parameters(module: torch.nn.Module) -> list[str]:
    import inspect

    return [str(p) for p in inspect.signature(module.forward).parameters.values()]


def _takes(module: torch.nn.Module, count: int) -> bool:
    import inspect

    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    positional = sum(k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for k in kinds)
    return positional >= count or inspect.Parameter.VAR_POSITIONAL in kinds


def _takes_keywords(module: torch.nn.Module, names: Sequence[str]) -> bool:
    import inspect

    parameters = inspect.signature(module.forward).parameters
    named = {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return set(names) <= named
