"""Results of verification as a JUnit report, which pipelines show beside their tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from surgery.errors import OutputError


@dataclass(frozen=True)
class Case:
    """One thing that was verified: what, what was seen, and what doesn't hold."""

    name: str
    summary: str
    problems: tuple[str, ...]


def junit(suite: str, cases: Sequence[Case]) -> bytes:
    """The XML of a suite of cases. It holds no time, so that equal results are equal bytes."""
    failed = sum(1 for case in cases if case.problems)
    counts = {"tests": str(len(cases)), "failures": str(failed), "errors": "0"}
    root = ElementTree.Element("testsuites", counts)
    inside = ElementTree.SubElement(root, "testsuite", {"name": _printable(suite), **counts})
    for case in cases:
        element = ElementTree.SubElement(
            inside, "testcase", {"classname": "surgery", "name": _printable(case.name)}
        )
        if case.problems:
            text = _printable("\n".join(case.problems))
            first = text.partition("\n")[0]
            failure = ElementTree.SubElement(
                element, "failure", {"message": first, "type": "VerificationError"}
            )
            failure.text = text
        ElementTree.SubElement(element, "system-out").text = _printable(case.summary)
    ElementTree.indent(root)
    xml: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return xml + b"\n"


def write_report(path: Path, suite: str, cases: Sequence[Case]) -> None:
    """Write the report. Raises OutputError where it can't be written."""
    try:
        path.write_bytes(junit(suite, cases))
    except OSError as error:
        raise OutputError(f"the report can't be written to {path}: {error.strerror}") from error


def _printable(text: str) -> str:
    """What XML can hold: it has no way to write most control characters."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
