"""What `--help` of the trainer says: a page that fits a screen, and every flag by section, wrapped at the terminal."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Sequence

from cogvit.config.fields import RunConfig
from cogvit.config.flags import Slot, settable, word_of
from cogvit.errors import ConfigError

ALL = "all"
_TOGETHER = "\N{NO-BREAK SPACE}"  # where a line is not to end
_FIRST = (  # what almost every run says
    "out", "data.shards", "data.held_out", "data.global_batch_images", "schedule.steps", "optim.lr", "init",
    "precision", "parallel.tp", "checkpoint.every_minutes",
)  # fmt: skip


def sections(preset: RunConfig | None = None) -> dict[str, list[Slot]]:
    """Return every flag by the part of the configuration that it belongs to; those of no part are of "run"."""
    groups: dict[str, list[Slot]] = {}
    for slot in settable(preset or RunConfig()):
        groups.setdefault(slot.path.partition(".")[0] if "." in slot.path else "run", []).append(slot)
    return groups


def section_text(name: str, preset: RunConfig | None = None) -> str:
    """Return the flags of one section with type, default and meaning, or of all. Errors: ConfigError."""
    groups = sections(preset)
    if name != ALL and name not in groups:
        raise ConfigError(f"there is no section {name!r} of flags; --help takes one of {', '.join(groups)} or {ALL}")
    chosen = groups if name == ALL else {name: groups[name]}
    return "\n\n".join(f"{title}:\n" + "\n".join(map(_entry, slots)) for title, slots in chosen.items())


def first_page(preset: RunConfig | None = None) -> str:
    """Return the flags that almost every run says, and which sections have the others."""
    slots = {slot.path: slot for slot in settable(preset or RunConfig())}
    lines = ["flags that most runs say:", *(_entry(slots[path]) for path in _FIRST if path in slots)]
    counts = ", ".join(f"{name}{_TOGETHER}({len(group)})" for name, group in sections(preset).items())
    more = f"--help SECTION explains the flags of one of: {counts}; --help {ALL}: every flag."
    return "\n".join([*lines, "", *(line.replace(_TOGETHER, " ") for line in textwrap.wrap(more, _width()))])


def table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Return names, figures and what they mean, wrapped in their columns."""
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = []
    for name, figure, meaning in rows:
        head = f"  {name:<{first}}  {figure:>{second}}  "
        lines += textwrap.wrap(meaning, _width(), initial_indent=head, subsequent_indent=" " * len(head))
    return "\n".join(lines)


def _entry(slot: Slot) -> str:
    value = slot.values[slot.key]
    default = "none" if value is None else value if isinstance(value, str) and value else json.dumps(value)
    meaning = f"{slot.help} [{default}]" if slot.help else f"[{default}]"
    return "\n".join(
        textwrap.wrap(
            f"{slot.flag} {word_of(slot)}", _width(), initial_indent="  ", subsequent_indent="    ",
            break_long_words=False, break_on_hyphens=False,
        )
        + textwrap.wrap(meaning, _width(), initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    )  # fmt: skip


def _width() -> int:
    return max(40, min(120, shutil.get_terminal_size((100, 24)).columns))
