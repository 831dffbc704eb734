"""A model made faster and run in this process: what `export` packages, without a server."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kpdeploy.artifact import located
from kpdeploy.errors import InputMismatch
from kpdeploy.inputs import Array
from kpdeploy.pipeline.exports import ExportReport, export
from kpdeploy.pipeline.levels import ACCURACY_BUDGET
from kpdeploy.progress import Progress
from kpdeploy.runtimes import source

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Optimized:
    """The packaged artifact, loaded. Call it with the model's inputs; `report` says what was tried and decided."""

    report: ExportReport
    run: Callable[[Sequence[Array]], Sequence[Array]]

    def __call__(self, *inputs: Array | torch.Tensor, **named: Array | torch.Tensor) -> dict[str, Array]:
        """The outputs by name, for inputs in the order of the signature or by its names.

        Raises:
            InputMismatch: an input is missing, too much, or of another dtype or rank.
        """
        specs = self.report.deployment.manifest.signature.inputs
        given = {**{spec.name: value for spec, value in zip(specs, inputs, strict=False)}, **named}
        if len(inputs) > len(specs) or set(given) != {spec.name for spec in specs}:
            wanted = ", ".join(spec.name for spec in specs)
            raise InputMismatch("the inputs are not the model's", next_step=f"give {wanted}, in this order or by name")
        arrays = []
        for spec in specs:
            array = np.ascontiguousarray(np.asarray(given[spec.name]))
            if array.dtype != np.dtype(spec.dtype) or array.ndim != len(spec.shape):
                raise InputMismatch(
                    f"{spec.name} is {array.dtype}{list(array.shape)}", next_step=f"give {spec.dtype}{list(spec.shape)}"
                )
            arrays.append(array)
        outputs = self.report.deployment.manifest.signature.outputs
        return {spec.name: np.asarray(a) for spec, a in zip(outputs, self.run(arrays), strict=True)}


def auto_optimize(
    model: str | torch.nn.Module,
    inputs: Any = None,
    *,
    repo: str | os.PathLike[str] = "models",
    format: str = "auto",
    level: str = "auto",
    accuracy_budget: str | float = ACCURACY_BUDGET,
    latency_budget_ms: float | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Optimized:
    """Climb the levels that this machine has, prove each, package the fastest within its budget in the folder `repo`,
    and load it here. The arguments are those of `export`.

    Raises:
        KpdeployError: as `export`; DigestMismatch.
    """
    report = export(
        model,
        inputs,
        repo=repo,
        format=format,
        level=level,
        accuracy_budget=accuracy_budget,
        latency_budget_ms=latency_budget_ms,
        calibrate=calibrate,
        name=name,
        progress=progress,
    )
    manifest, folder, chosen = report.deployment.manifest, Path(report.deployment.folder), report.chosen
    manifest.check_files(folder)
    assert chosen.artifact is not None
    # By its path: a runtime's file stands alone, and some are named as the package that they import.
    found = importlib.util.spec_from_file_location(f"kpdeploy_runtime_{manifest.format}", source(manifest.format))
    assert found is not None
    assert found.loader is not None
    runtime = importlib.util.module_from_spec(found)
    found.loader.exec_module(runtime)
    run = runtime.load(
        str(folder / manifest.filename),
        inputs=list(chosen.artifact.input_names),
        outputs=list(chosen.artifact.output_names),
        settings=located(manifest.settings, folder),
    )
    return Optimized(report=report, run=run)
