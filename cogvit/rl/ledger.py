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
    """Add entries behind those of a ledger; the file is made where there is none.

    Errors: DataError when it cannot be written: without it a run does not know what it has asked.
    """
    lines = "".join(f"{json.dumps(asdict(entry))}\n" for entry in entries)
    try:
        with path.open("a") as file:
            file.write(lines)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from None


def read(path: Path) -> list[Entry]:
    """Return the entries of a ledger, but for a last line that a killed writer left unfinished.

    Errors: DataError names a line that is no entry.
    """
    *lines, _ = path.read_bytes().split(b"\n")
    return [_entry(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def rewind(path: Path, step: int) -> None:
    """Forget what became known after a step, from which a run goes on.

    Behind that a crash may have left anything. Errors: DataError names a line before it that is no entry.
    """
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")[:-1]
    while lines and not _is_known(lines[-1], step):
        lines.pop()
    entries = (_entry(line, f"{path}:{number}") for number, line in enumerate(lines, 1))
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    append(new, [entry for entry in entries if entry.step <= step])
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


def _is_known(line: bytes, step: int) -> bool:
    """Whether a line says what became known by a step."""
    try:
        return _entry(line, "").step <= step
    except DataError:
        return False


def _entry(line: bytes, place: str) -> Entry:
    try:
        entry = Entry(**json.loads(line))
        _check_types(entry)
    except (TypeError, ValueError, RecursionError):
        names, told = ", ".join(field.name for field in fields(Entry)), line[:60].decode(errors="replace")
        raise DataError(f"{place} is no entry of a ledger: {told!r}; expected {names}") from None
    if entry.end not in ENDS:
        raise DataError(f"{place}: end {entry.end!r} is none of {', '.join(ENDS)}")
    return entry


def _check_types(entry: Entry) -> None:
    """Errors: TypeError."""
    texts, numbers = (entry.id, entry.source), (entry.version, entry.step)
    if not (all(type(text) is str for text in texts) and all(type(number) is int for number in numbers)):
        raise TypeError
