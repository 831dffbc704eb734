"""A check as files: JUnit XML for CI, and a picture of the windows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

from kpdeploy.errors import RepositoryUnwritable
from kpdeploy.monitoring.check import CheckReport, Finding
from kpdeploy.monitoring.pictures import BLUE, FAINT, GREY, ORANGE


def junit(report: CheckReport, path: Path) -> None:
    """One test case a finding: failed where it regressed, skipped where it cannot be told."""
    suite = Xml.Element("testsuite", name=f"kpdeploy check {report.model}", time=f"{report.seconds:.1f}")
    counts = {"failures": 0, "skipped": 0}
    for finding in report.findings:
        case = Xml.SubElement(
            suite, "testcase", classname=f"kpdeploy.check.{report.model}", name=finding.what, time="0"
        )
        told = f"{finding.old:.4g} {finding.unit} -> {finding.new:.4g} {finding.unit}: {finding.judgement.reason}"
        if finding.judgement.outcome == "regressed":
            Xml.SubElement(case, "failure", message=f"regressed: {told}").text = f"{report.new} against {report.old}"
            counts["failures"] += 1
        elif finding.unknown:
            Xml.SubElement(case, "skipped", message=f"cannot tell: {told}")
            counts["skipped"] += 1
        else:
            Xml.SubElement(case, "system-out").text = told
    for answer in report.answers:
        case = Xml.SubElement(
            suite, "testcase", classname=f"kpdeploy.check.{report.model}", name=answer.output, time="0"
        )
        if not answer.passed:
            message = f"wrong: off by {answer.error:.2e}, at most {answer.tolerance:.0e} is right"
            Xml.SubElement(case, "failure", message=message)
            counts["failures"] += 1
    suite.set("tests", str(len(report.findings) + len(report.answers)))
    suite.set("errors", "0")
    for name, count in counts.items():
        suite.set(name, str(count))
    try:
        Xml.ElementTree(suite).write(path, encoding="unicode", xml_declaration=True)
    except OSError as error:
        raise RepositoryUnwritable(f"{path} cannot be written", why=str(error)) from None


def draw(report: CheckReport, path: Path) -> None:
    """All windows of each median latency, old and new, in the order in which they were taken."""
    from matplotlib.figure import Figure

    shown = [finding for finding in report.findings if finding.decisive]
    figure = Figure(figsize=(9, 0.8 + 2.6 * len(shown)), dpi=160, layout="constrained")
    for axes, finding in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
        _windows(axes, finding)
    figure.suptitle(
        f"{report.new} beside {report.old}: {report.outcome}", x=0.012, ha="left", fontsize=12, weight="bold"
    )
    try:
        figure.savefig(path, facecolor="white")
    except OSError as error:
        raise RepositoryUnwritable(f"{path} cannot be written", why=str(error)) from None


def _windows(axes: Any, finding: Finding) -> None:
    sides = (("old", BLUE, finding.old_values, finding.old), ("new", ORANGE, finding.new_values, finding.new))
    for name, color, values, middle in sides:
        axes.plot(values, color=color, linewidth=1.2, marker="o", markersize=3, label=f"{name} {middle:.3g} ms")
        axes.axhline(middle, color=color, linewidth=0.8, linestyle="--")
    low, high = finding.judgement.low - 1, finding.judgement.high - 1
    bounds = f", {low:+.1%} to {high:+.1%}" if math.isfinite(high) else ""
    axes.set_title(
        f"{finding.what}: {finding.judgement.outcome}, {finding.judgement.reason}{bounds}", loc="left", fontsize=9
    )
    axes.set_ylabel("ms a window", color=GREY)
    axes.set_ylim(0, None)
    axes.grid(axis="y", color=FAINT)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
