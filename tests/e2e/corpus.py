"""A small corpus and two small teachers on disk, for tests that run whole commands."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.index import build_index
from tests.data.corpus import members, picture, write_tar
from tools.make_demo_teachers import main as make_teachers

NUMBERS = ("zero", "one", "two", "three")


def write_shards(directory: Path, name: str, count: int, first_seed: int = 0) -> None:
    """A shard of small pictures with labels and captions in two languages, and its index; a seed is a picture."""
    entries = []
    for number in range(count):
        label = number % len(NUMBERS)
        entries += members(
            f"{number:04d}",
            picture(24 + 8 * (number % 3), 24 + 8 * (number % 2), seed=first_seed + number),
            source="numbers",
            label=label,
            captions={"en": [f"the number {NUMBERS[label]}"], "zh": [f"数字{label}"]},
        )
    write_tar(directory / f"{name}.tar", entries)
    for _ in build_index(str(directory)):
        continue


def write_world(directory: Path) -> Path:
    """shards/, heldout/ and teachers/ in a directory; returns it."""
    write_shards(directory / "shards", "numbers-00000", 48)
    write_shards(directory / "heldout", "numbers-00000", 16, first_seed=1000)
    assert make_teachers(["--out", str(directory / "teachers")]) == 0
    return directory
