"""What the check has found so far: a JSON file and a readable one, written anew after every section."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NAME = "gpu_check"
Status = str  # "ok", or what went wrong


@dataclass(frozen=True)
class Section:
    """One section's outcome."""

    name: str
    status: Status
    seconds: float
    figures: dict[str, Any]
    trace: str = ""


def read(out: Path) -> list[Section]:
    """Return the sections that are done."""
    path = out / f"{NAME}.json"
    return [Section(**one) for one in json.loads(path.read_text())["sections"]] if path.exists() else []


def write(out: Path, command: str, sections: Sequence[Section]) -> None:
    """Write both files; each is whole at every moment."""
    whole = {"command": command, "sections": [asdict(section) for section in sections]}
    texts = {f"{NAME}.json": json.dumps(whole, indent=1) + "\n", f"{NAME}.txt": readable(command, sections)}
    for name, text in texts.items():
        unfinished = out / f"{name}.part"
        unfinished.write_text(text)
        unfinished.replace(out / name)


def readable(command: str, sections: Sequence[Section]) -> str:
    """Return a text for people: a line on each section, then each with its figures."""
    lines = [command, ""]
    lines += [f"{section.name:<14} {section.seconds:7.1f} s  {section.status}" for section in sections]
    for section in sections:
        lines += ["", f"== {section.name}", *_lines(section.figures)]
        lines += section.trace.splitlines()
    return "\n".join(lines) + "\n"


def _lines(figures: dict[str, Any], indent: str = "") -> list[str]:
    lines: list[str] = []
    for name, value in figures.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [f"{indent}{name}:", *(f"{indent}  {line}" for line in _table(value))]
        else:
            lines.append(f"{indent}{name}: {_word(value)}")
    return lines


def _table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_word(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _word(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
