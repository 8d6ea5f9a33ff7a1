"""The document of results: printed row by row, and written as JSON after every row."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pisa_jax.runtime.atomic_write import atomic_write

SCHEMA = 1
# Parts of the name of a row of inference, its value, and the largest value that is wanted.
TARGETS = (
    (("512x512, batch 1,", "default"), "times_floor", 2.5),
    (("512x512, batch 16,", "default"), "times_floor", 1.7),
    (("512x512, batch", "adjustable"), "of_default", 1.25),
    (("512x512, batch", "further pair"), "of_default", 0.65),
)


class Report:
    """Results so far; `document` is what the file holds."""

    def __init__(self, path: Path, **header: Any):
        self.path = path
        self.document: dict[str, Any] = {"schema": SCHEMA, **header, "finished": False, "parts": []}
        self.write()

    def write(self) -> None:
        """Write the file."""
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")

    def start_part(self, name: str, title: str, allotted: float) -> None:
        """Begin a part that has `allotted` seconds."""
        self.document["parts"].append({"name": name, "title": title, "status": "running", "seconds": 0.0, "rows": []})
        print(f"\n{title} (at most {allotted:.0f} s)", flush=True)
        self.write()

    def add_row(self, row: dict[str, Any]) -> None:
        """Add a row to the last part."""
        rows = self.document["parts"][-1]["rows"]
        # The first of the skipped rows says why; the file has them all.
        if row["status"] != "skipped" or _skipped(rows) == 0:
            print(row_text(row), flush=True)
        rows.append(row)
        self.write()

    def end_part(self, status: str, seconds: float) -> None:
        """End the last part: "complete", "cut short" if rows are missing for want of time, "failed" or "skipped"."""
        part = self.document["parts"][-1]
        part |= {"status": status, "seconds": round(seconds, 1)}
        skipped = f", {_skipped(part['rows'])} skipped" if _skipped(part["rows"]) > 1 else ""
        print(f"  {status}, {seconds:.0f} s{skipped}", flush=True)
        self.write()

    def finish(self, summary: list[dict[str, Any]]) -> None:
        """End the document."""
        self.document |= {"finished": True, "summary": summary}
        self.write()
        print("\nSummary")
        for row in summary:
            print(row_text(row))
        rows = [row for part in self.document["parts"] for row in part["rows"]]
        counts = {status: sum(row["status"] == status for row in rows) for status in {row["status"] for row in rows}}
        print(f"\n{', '.join(f'{count} {status}' for status, count in sorted(counts.items()))}", flush=True)


def row_text(row: Mapping[str, Any]) -> str:
    """Format a row for the terminal."""
    values = ", ".join(f"{key} {value_text(value)}" for key, value in row["values"].items())
    text = ": ".join(filter(None, (values, row["message"])))
    return f"  {row['status']:13s} {row['name']}{' | ' if text else ''}{text}"


def value_text(value: Any) -> str:
    """Format a number with three or four digits.

    >>> value_text(0.000123456), value_text(1234.5), value_text(3)
    ('0.000123', '1234', '3')
    """
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def summarize(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compare the rows of inference with the targets, and with PyTorch where both were measured."""
    rows = {part["name"]: {row["name"]: row["values"] for row in part["rows"]} for part in document["parts"]}
    ours, theirs = rows.get("inference", {}), rows.get("torch_inference", {})
    summary = []
    for name, values in ours.items():
        for words, key, most in TARGETS:
            if key in values and all(word in name for word in words):
                values_of_row = {key: values[key], "target": most, "met": "yes" if values[key] <= most else "no"}
                summary.append(_summary_row(f"target, {name}", values_of_row))
    for name, values in theirs.items():
        mine = ours.get(name.rsplit(", ", 1)[0], {}).get("ms")
        if mine and "ms" in values:
            summary.append(_summary_row(f"PyTorch / pisa_jax, {name}", {"ratio": values["ms"] / mine}))
    return summary


def _skipped(rows: list[dict[str, Any]]) -> int:
    return sum(row["status"] == "skipped" for row in rows)


def _summary_row(name: str, values: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "status": "ok", "message": "", "values": values}
