"""Every error a user can meet: one class, one exit code, what went wrong, why, and the next step.

The classes below are the documentation of the exit codes (`kpdeploy exit-codes` prints them). 0 is success,
1 a defect of kpdeploy itself, 2 a wrong command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class KpdeployError(Exception):
    """Base of all errors that are shown to a user as one message.

    Args:
        what: what could not be done, naming the thing (a file, an input, a port).
        why: the reason, in the words of whatever refused.
        next_step: what the user can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, why: str = "", next_step: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.next_step = next_step

    @property
    def in_a_line(self) -> str:
        """What and why, for a table, a log or the reason of another error."""
        return f"{self.what}: {self.why}" if self.why else self.what

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"why:  {self.why}")
        if self.next_step:
            lines.append(f"next: {self.next_step}")
        return "\n".join(lines)


class UnknownName(KpdeployError):
    """A target, format or option value that does not exist."""

    exit_code = 3


class ConfigFileBroken(KpdeployError):
    """kpdeploy.toml cannot be read, or holds an unknown key."""

    exit_code = 4


# 10-19: the MODEL argument


class ModelNotFound(KpdeployError):
    """MODEL names nothing: no such example, file, folder, module or attribute."""

    exit_code = 10


class ModelBroken(KpdeployError):
    """The model's file exists and cannot be read as what it claims to be."""

    exit_code = 11


class ModelUnsafe(KpdeployError):
    """Loading the model would run code from the file (a pickle)."""

    exit_code = 12


class FactoryFailed(KpdeployError):
    """The factory `package.module:factory` could not be imported, or raised."""

    exit_code = 13


class FactoryReturned(KpdeployError):
    """The factory returned something that is not a module, or a module and its inputs."""

    exit_code = 14


class TaskUnknown(KpdeployError):
    """A Hugging Face folder does not tell its task, or the task is not known here."""

    exit_code = 15


class PackageMissing(KpdeployError):
    """An optional package that this MODEL or format needs is not installed."""

    exit_code = 16


# 20-29: its inputs


class InputsUnknown(KpdeployError):
    """Nothing says what the model's inputs are."""

    exit_code = 20


class InputSyntax(KpdeployError):
    """`--input` or `--example` cannot be parsed."""

    exit_code = 21


class InputMismatch(KpdeployError):
    """The inputs that were given do not fit the model (name, dtype, rank or range)."""

    exit_code = 22


class ModelRejectsInputs(KpdeployError):
    """The unmodified model raised when it was called with its own inputs."""

    exit_code = 23


class OutputUnusable(KpdeployError):
    """The unmodified model gives nothing that can be compared (no tensor, or NaN)."""

    exit_code = 24


# 30-39: export and proof


class ExportFailed(KpdeployError):
    """The model could not be written in the format."""

    exit_code = 30


class ProofFailed(KpdeployError):
    """An artifact does not give the original's answers, or could not be run at all."""

    exit_code = 31


class FormatUnavailable(KpdeployError):
    """The format cannot be made from this model, or cannot be served by the target."""

    exit_code = 32


class LevelUnavailable(KpdeployError):
    """This machine, target or format has not what the level asked for needs."""

    exit_code = 33


class BudgetUnmet(KpdeployError):
    """No artifact is within the latency or accuracy that was asked for."""

    exit_code = 34


class MemoryExceeded(KpdeployError):
    """No artifact fits into the memory that was allowed."""

    exit_code = 35


# 40-49: the repository


class RepositoryUnwritable(KpdeployError):
    """The repository's folder cannot be written."""

    exit_code = 40


class DiskFull(KpdeployError):
    """No space was left while writing."""

    exit_code = 41


class RepositoryBroken(KpdeployError):
    """A folder that should be a model repository is missing, empty, or not readable as one."""

    exit_code = 42


class RepositoryBusy(KpdeployError):
    """Another export is writing to the same repository."""

    exit_code = 43


class DigestMismatch(KpdeployError):
    """A file of the repository is not the file that was proven."""

    exit_code = 44


class WouldNotLoad(KpdeployError):
    """A model of the repository would not load in the container (or here), or that is not known."""

    exit_code = 45


# 50-59: serving


class PortInUse(KpdeployError):
    """A port that the server needs is taken."""

    exit_code = 50


class ServerUnavailable(KpdeployError):
    """The server's own environment could not be made, or holds no server."""

    exit_code = 51


class LibraryMissing(KpdeployError):
    """A shared library that the server needs is not on this machine."""

    exit_code = 52


class ModelLoadFailed(KpdeployError):
    """The server refused the model."""

    exit_code = 53


class ServerDied(KpdeployError):
    """The server ended by itself."""

    exit_code = 54


class NotReady(KpdeployError):
    """No golden request came back right in time."""

    exit_code = 55


# 60-69: talking to a server


class Unreachable(KpdeployError):
    """Nothing answers at the address."""

    exit_code = 60


class ModelNotServed(KpdeployError):
    """The server answers, and does not serve the model."""

    exit_code = 61


class AnswersDiffer(KpdeployError):
    """The server's answers are not the golden ones."""

    exit_code = 62


class LoadFailed(KpdeployError):
    """Under load, no request succeeded."""

    exit_code = 63


# 70-79: the kernels


class ShapeMalformed(KpdeployError):
    """A shape is not the sizes that the op has."""

    exit_code = 70


class KernelsMissing(KpdeployError):
    """There is no kernel here that could be validated."""

    exit_code = 71


class KernelsDiffer(KpdeployError):
    """A kernel does not give its reference's answers."""

    exit_code = 72


# 90-95: judging


class Regressed(KpdeployError):
    """A check found the new version slower, larger or wrong."""

    exit_code = 90


class CannotTell(KpdeployError):
    """A check ended without an answer: the machine is too noisy, or the time was too short."""

    exit_code = 91


class NothingToCompare(KpdeployError):
    """What a version should be compared with is not there, or is another model."""

    exit_code = 92


class HistoryUnusable(KpdeployError):
    """The history cannot be opened, read or written, or a newer release wrote it."""

    exit_code = 93


class RolledBack(KpdeployError):
    """A rollout did not pass its trial; the version before it is served."""

    exit_code = 94


# 85-89: monitoring


class BaselineUnusable(KpdeployError):
    """There is no baseline to compare with, or it is one of something else."""

    exit_code = 85


class ProgramMissing(KpdeployError):
    """A program that watches (Prometheus, Alertmanager) is not installed, or does not start."""

    exit_code = 86


class RulesBroken(KpdeployError):
    """Prometheus refuses the rules."""

    exit_code = 87


class ClockSkewed(KpdeployError):
    """Two clocks that must agree do not."""

    exit_code = 88


def did_you_mean(given: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """The hint at the nearest of the known names; `otherwise` where none is near."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def exit_codes() -> list[tuple[int, str, str]]:
    """All exit codes as (code, name, meaning), in order."""
    kinds = sorted(KpdeployError.__subclasses__(), key=lambda kind: kind.exit_code)
    return [(kind.exit_code, kind.__name__, (kind.__doc__ or "").strip()) for kind in kinds]
