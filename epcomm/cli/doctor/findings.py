"""One line of the doctor's report, and the report made of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from epcomm import env

__all__ = ["Finding", "Status", "cuda_state", "host_works", "to_json", "to_lines", "to_text", "wants_colour"]

Status = Literal["ok", "warn", "missing", "FAIL"]

_STATUSES: tuple[Status, ...] = get_args(Status)
_COLOURS: dict[Status, str] = {"ok": "\033[32m", "warn": "\033[33m", "missing": "\033[36m", "FAIL": "\033[31m"}
_PLAIN = "\033[0m"

# The checks that the CUDA backend needs, in the order in which a user would mend them.
_CUDA_CHECKS = ("cuda backend", "cuda sources", "gpu", "cupy", "nvrtc", "kernels")


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: name of the check, the first column of the report.
        status: ``ok``; ``warn``: works, but look; ``missing``: not installed; ``FAIL``: there, but broken.
        text: what was found, on one line.
        advice: what to do about it, a command where there is one; empty when nothing needs doing.
    """

    check: str
    status: Status
    text: str
    advice: str = ""

    @classmethod
    def from_record(cls, record: Any) -> Finding:
        """Rebuilds a finding that came through JSON.

        Raises:
            ValueError: the record is not a finding.
        """
        if not isinstance(record, dict) or set(record) != {"check", "status", "text", "advice"}:
            raise ValueError(f"not a finding: {record!r:.80}")
        if not all(isinstance(value, str) for value in record.values()) or record["status"] not in _STATUSES:
            raise ValueError(f"not a finding: {record!r:.80}")
        return cls(**record)


def host_works(findings: Sequence[Finding]) -> bool:
    """Whether two ranks exchanged tokens through the host backend and the bits were right."""
    return any(finding.check == "smoke test" and finding.status == "ok" for finding in findings)


def cuda_state(findings: Sequence[Finding]) -> str:
    """Whether two ranks exchanged tokens through the CUDA backend, else the first of its parts that is not there."""
    by_check = {finding.check: finding for finding in findings}
    for check in _CUDA_CHECKS:
        finding = by_check.get(check)
        if finding is None:
            return f"not usable ({check}: not checked)"
        if finding.status not in ("ok", "warn"):
            return f"not usable ({check}: {finding.text})"
    smoke = by_check.get("gpu smoke test")
    if smoke is None:
        return "has all it needs (not exercised)"
    return "works" if smoke.status == "ok" else f"has all it needs, but does not work ({smoke.text})"


def to_json(findings: Sequence[Finding]) -> str:
    """The report as JSON: ``{"findings": [...], "host": bool, "cuda": str}``."""
    report = {
        "findings": [asdict(finding) for finding in findings],
        "host": host_works(findings),
        "cuda": cuda_state(findings),
    }
    return json.dumps(report, indent=2)


def to_text(findings: Sequence[Finding], *, colour: bool = False) -> str:
    """The report for a terminal: the lines of all findings, the summary last."""
    host = "works" if host_works(findings) else "does not work (see the lines above)"
    summary = f"host backend: {host}; cuda backend: {cuda_state(findings)}"
    return "\n".join([*to_lines(findings, colour=colour), "", summary])


def to_lines(findings: Sequence[Finding], *, colour: bool = False) -> list[str]:
    """One aligned line a check, its advice under it."""
    mark_width = max(map(len, _STATUSES))
    check_width = max((len(finding.check) for finding in findings), default=0)
    indent = " " * (mark_width + check_width + 4)
    lines = []
    for finding in findings:
        mark = f"{finding.status:<{mark_width}}"
        if colour:
            mark = f"{_COLOURS[finding.status]}{mark}{_PLAIN}"
        lines.append(f"{mark}  {finding.check:<{check_width}}  {finding.text}".rstrip())
        lines += [f"{indent}-> {line}" for line in finding.advice.splitlines()]
    return lines


def wants_colour() -> bool:
    """Colour only for a person at a terminal who has not said no (https://no-color.org)."""
    return sys.stdout.isatty() and not env.lookup("NO_COLOR")
