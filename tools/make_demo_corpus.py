"""Write the demo corpus: pictograms, handwritten digits and photographs with English and Chinese captions.

Every picture comes with a package that pip installs; nothing is downloaded. DIR/train and DIR/heldout hold webdataset
shards, DIR/train-questions and DIR/heldout-questions questions about such pictures; DIR/corpus.json says what is in
them, from which seed and under which licenses, DIR/digits.json what the digits are called. Held-out pictograms are
other drawings of the same pictograms; held-out digits are other digits. Equal seeds give equal bytes.

usage: python -m tools.make_demo_corpus --out DIR [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cogvit.errors import CogViTError, ConfigError
from tools.demo_corpus import digits, photos, pictograms, questions
from tools.demo_corpus.sample import Sample, write_shard

DRAWINGS_PER_PICTOGRAM = 8
DRAWINGS_PER_DIGIT = 2
CROPS_PER_PHOTO = 48
ASKED_DRAWINGS = 2  # of each pictogram and digit, that questions are about
CONTENTS = "corpus.json"
NAMES = "digits.json"  # of the classes, for cogvit.evaluate --prompts
_MAKER = "tools.make_demo_corpus"
_SOURCES = {
    pictograms.SOURCE: {
        "what": f"the font {pictograms.FONT_FILE} with names from Unicode CLDR",
        "packages": ["manimgx-fonts", "emoji"],
        "license": "font: OFL-1.1; names: BSD-3-Clause (emoji), Unicode-3.0 (CLDR)",
    },
    digits.SOURCE: {
        "what": "the UCI Optical Recognition of Handwritten Digits test set",
        "packages": ["scikit-learn"],
        "license": "CC-BY-4.0 (E. Alpaydin, C. Kaynak, 1998)",
    },
    questions.SOURCE: {
        "what": "drawings of both, each with a question and its answer",
        "packages": [],
        "license": "as the pictograms and the digits",
    },
    photos.SOURCE: {
        "what": "crops of scikit-image's sample photographs",
        "packages": ["scikit-image"],
        "license": "CC0 or public domain",
    },
}


@dataclass(frozen=True)
class Shard:
    """One shard to write, its samples drawn when they are asked for."""

    path: str  # below the corpus directory
    samples: Iterable[Sample]


def shards(seed: int) -> Iterator[Shard]:
    """Yield the shards of the corpus."""
    train_digits, heldout_digits = digits.split(seed)
    heldout = DRAWINGS_PER_PICTOGRAM  # the number of a drawing that no training shard holds
    for number in range(DRAWINGS_PER_PICTOGRAM):
        yield Shard(f"train/pictograms-{number:05d}.tar", pictograms.drawings(seed, number))
    for number in range(DRAWINGS_PER_DIGIT):
        yield Shard(f"train/digits-{number:05d}.tar", digits.drawings(seed, number, train_digits))
    yield Shard("train/photos-00000.tar", photos.crops(seed, CROPS_PER_PHOTO))
    yield Shard("heldout/pictograms-00000.tar", pictograms.drawings(seed, heldout))
    yield Shard("heldout/digits-00000.tar", digits.drawings(seed, heldout, heldout_digits))
    for number in range(ASKED_DRAWINGS):
        yield Shard(f"train-questions/colors-{number:05d}.tar", _colors(seed, number))
        yield Shard(f"train-questions/names-{number:05d}.tar", _names(seed, number, train_digits))
    yield Shard("heldout-questions/colors-00000.tar", _colors(seed, heldout))
    yield Shard("heldout-questions/names-00000.tar", _names(seed, heldout, heldout_digits))


def _colors(seed: int, number: int) -> Iterator[Sample]:
    return questions.of_pictograms(pictograms.drawings(seed, number))


def _names(seed: int, number: int, indices: NDArray[np.int64]) -> Iterator[Sample]:
    return questions.of_digits(digits.drawings(seed, number, indices))


def build(directory: Path, planned: Sequence[Shard], seed: int) -> dict[str, int]:
    """Write every shard, report each in a line, then the contents; returns the number of samples by shard."""
    start_s, counts = time.monotonic(), dict[str, int]()
    for position, shard in enumerate(planned, 1):
        counts[shard.path] = write_shard(directory / shard.path, shard.samples)
        elapsed_s = time.monotonic() - start_s
        print(
            f"[{position:2d}/{len(planned)}] {shard.path}: {counts[shard.path]} images, {elapsed_s:.1f} s", flush=True
        )
    packages = sorted({name for source in _SOURCES.values() for name in source["packages"]} | {"pillow", "webdataset"})
    contents = {
        "made_by": _MAKER,
        "seed": seed,
        "shards": counts,
        "sources": _SOURCES,
        "versions": {name: version(name) for name in packages},
    }
    (directory / CONTENTS).write_text(json.dumps(contents, indent=1) + "\n")
    names = {"en": list(digits.NAMES_EN), "zh": list(digits.NAMES_ZH)}
    prompts = {language: {"classes": classes, "templates": ["{}"]} for language, classes in names.items()}
    (directory / NAMES).write_text(json.dumps(prompts, ensure_ascii=False, indent=1) + "\n")
    return counts


def check_replaceable(out: Path) -> None:
    """Refuse a directory that holds anything but a corpus of ours and the indexes of its shards.

    Errors: ConfigError with the first thing that is not ours.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"--out {out} is a file; choose a new directory")
    ours = _files_of_corpus(out)
    for path in sorted(out.rglob("*")):
        index = path.with_suffix("") in ours or (ours and re.match(r"corpus-[0-9a-f]{12}\.cogvit", path.name))
        if not path.is_dir() and path not in ours and not index:
            raise ConfigError(
                f"--out {out} holds {path.relative_to(out)}, which is not of a demo corpus; choose another"
            )


def _files_of_corpus(out: Path) -> set[Path]:
    """Return the files that the corpus in a directory is made of; none where there is no corpus."""
    try:
        contents = json.loads((out / CONTENTS).read_text())
        shards = contents["shards"] if contents["made_by"] == _MAKER else None
    except (OSError, ValueError, LookupError, TypeError):
        shards = None
    return set() if shards is None else {out / name for name in (CONTENTS, NAMES, *shards)}


def make(out: Path, planned: Sequence[Shard], seed: int) -> dict[str, int]:
    """Build a corpus of these shards beside `out` and put it there in one rename, in place of an older one."""
    check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        fresh, old = Path(scratch) / "fresh", Path(scratch) / "old"
        counts = build(fresh, planned, seed)
        if out.exists():
            out.rename(old)
        fresh.rename(out)
    return counts


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {_MAKER}", description=__doc__.partition("\n\nUsage")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the corpus goes")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of every drawing, split and order [0]")
    options = parser.parse_args(argv)
    try:
        if options.seed < 0:
            raise ConfigError(f"--seed {options.seed} must not be negative; use 0 or more")
        counts = make(options.out.resolve(), list(shards(options.seed)), options.seed)
    except CogViTError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{sum(counts.values())} images in {len(counts)} shards under {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
