"""What became of every request: one line each in OUT/ledger.jsonl, written when its fate is known."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from cogvit.errors import DataError

End = Literal["trained", "aborted", "failed", "stale"]
ENDS: tuple[End, ...] = get_args(End)


@dataclass(frozen=True, slots=True)
class Entry:
    """The fate of one request.

    Attributes:
        id: of the request; a prompt that was aborted and taken up again keeps it.
        source: of its task.
        version: of the weights that began its answer.
        step: of training, when its fate was known.
        end: `trained` on, `aborted` to be resumed, `failed` because its task or verifier did, or too `stale` to train.
    """

    id: str
    source: str
    version: int
    step: int
    end: End


def append(path: Path, entries: Iterable[Entry]) -> None:
    """Add entries behind those of a ledger; the file is made where there is none."""
    lines = "".join(f"{json.dumps(asdict(entry))}\n" for entry in entries)
    with path.open("a") as file:
        file.write(lines)


def read(path: Path) -> list[Entry]:
    """Return the entries of a ledger, but for a last line that a killed writer left unfinished.

    Errors: DataError names a line that is no entry.
    """
    *lines, _ = path.read_text().split("\n")
    return [_entry(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def rewind(path: Path, step: int) -> None:
    """Forget what became known after a step, from which a run goes on."""
    if path.exists():
        kept = [entry for entry in read(path) if entry.step <= step]
        new = path.with_suffix(".new")
        new.write_text("")
        append(new, kept)
        new.replace(path)


def faults(entries: Sequence[Entry], issued: Iterable[str]) -> list[str]:
    """Return what is wrong with a whole run's ledger: requests that are missing, unknown or that ended twice.

    A request may be `aborted` any number of times before it ends.
    """
    ended = Counter(entry.id for entry in entries if entry.end != "aborted")
    known = Counter(entry.id for entry in entries)
    issued = list(issued)
    found = [f"{request} has no end" for request in issued if not ended[request]]
    found += [f"{request} ended {times} times" for request, times in ended.items() if times > 1]
    return found + [f"{request} was never issued" for request in known.keys() - set(issued)]


def _entry(line: str, place: str) -> Entry:
    try:
        values = json.loads(line)
        entry = Entry(**values)
    except (TypeError, ValueError):
        names = ", ".join(field.name for field in fields(Entry))
        raise DataError(f"{place} is no entry of a ledger: {line[:60]!r}; expected {names}") from None
    if entry.end not in ENDS:
        raise DataError(f"{place}: end {entry.end!r} is none of {', '.join(ENDS)}")
    return entry
