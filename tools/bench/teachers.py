"""Whether teachers are in the way: their store beside a plain file, a step with each source of targets, what both cost.

usage: python -m tools.bench.teachers [flags]
  --parts store,overlap,cost  what is measured
  --dtypes bf16,uint8  how features are stored
  --images 256     of the store, 256 tokens each
  --dim 1152       channels of a feature
  --activations DIR  a feature store (fp32, bf16 or fp16) of real activations for the error of uint8; by default the
                   demo's teachers see pictograms
  --size small     tiny, small or base: the student, of the reference family
  --batch 4        images of a step, 14 x 14 patches each
  --steps 8        that count in each turn
  --rounds 5       turns of every contender; the tables have medians over them, by the clock
  --dir DIR        where files go; by default in the temporary directory
  --out FILE       also write the record there

Store: both write to the disk (fsync) and rename; before each reading the system is told to forget the file, but for the
rows "from memory". The plain file is written and read image by image, into the same memory; ours encodes float32
features, adds and checks checksums and gives float32: all tokens in order, at random the masked 35 % of whole images
that were read, by the requests of training, and the system is told of a request's images before, for both. Overlap: one
process; a turn's time over its steps, stalls included; the store's file lies in the page cache, so its row is what
reading costs the processor, not the disk; the actor runs a teacher of 768 channels whose forward sleeps, so that the
processor is the student's. Cost: a model that nothing here has measured.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import cast, get_args

import numpy as np
import torch
from torch import Tensor

from cogvit.errors import ConfigError
from cogvit.teacher.encoding import StoreDtype
from cogvit.teacher.shard import open_shard
from cogvit.teacher.zoo import load_teacher
from configs.models import Size
from tools import make_demo_teachers
from tools.bench._overlap import Work, overlap_lines
from tools.bench._record import flags_of, run_benchmark
from tools.bench._serving import cost_lines
from tools.bench._store_io import Setting, quantization_error, size_line, store_lines
from tools.demo_corpus import pictograms

PARTS = ("store", "overlap", "cost")
GRID = (16, 16)
_PICTOGRAMS = 100
_PATCH_PX = 8  # of the demo's pictograms
_MOST_IMAGES = 500  # of a given store


@dataclass(frozen=True)
class Arguments:
    """The flags, as the usage explains them."""

    parts: str = ",".join(PARTS)
    dtypes: str = "bf16,uint8"
    images: str = "256"
    dim: str = "1152"
    activations: str = ""
    size: str = "small"
    batch: str = "4"
    steps: str = "8"
    rounds: str = "5"
    dir: str = ""
    out: str = ""


def stored_activations(directory: Path) -> dict[str, list[Tensor]]:
    """Return features of some images by each teacher of a store. Errors: ConfigError when there is none to be had."""
    found: dict[str, list[Tensor]] = {}
    for path in sorted(directory.glob("*/*.safetensors")):
        features, _ = open_shard(path)
        if "low" in features.parts:
            raise ConfigError(
                f"--activations {directory} holds uint8, whose error it has already; give fp32, bf16 or fp16"
            )
        of_teacher = found.setdefault(path.parent.name, [])
        of_teacher += [features.read(sample) for sample in islice(features.place, _MOST_IMAGES - len(of_teacher))]
    if not found:
        raise ConfigError(f"--activations {directory} holds no features; give a store of tools.precompute_features")
    return found


def demo_activations(directory: Path) -> dict[str, list[Tensor]]:
    """Return features of pictograms by the demo's teachers."""
    images = [np.array(sample.image) for sample in islice(pictograms.drawings(0, 0), _PICTOGRAMS)]
    found = {}
    for path in make_demo_teachers.make(directory):
        teacher = load_teacher(str(path), "fp32")
        found[f"demo {path.name}"] = [teacher.features(*_seen(image, teacher.input_px))[0] for image in images]
    return found


def _seen(
    image: np.ndarray, input_px: Callable[[tuple[int, int]], tuple[int, int]]
) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """Return an image as a teacher wants it and its grid; the teachers' patches are whole fractions of ours."""
    grid = image.shape[0] // _PATCH_PX, image.shape[1] // _PATCH_PX
    step = image.shape[0] // input_px(grid)[0]
    return [np.ascontiguousarray(image[::step, ::step])], [grid]


def store_report(arguments: Arguments, directory: Path) -> Iterator[str]:
    """Yield the tables of the store."""
    sizes = []
    yield "| stored | what | plain file MB/s | store MB/s | share |"
    yield "|---|---|---|---|---|"
    for dtype in cast(Sequence[StoreDtype], arguments.dtypes.split(",")):
        own = directory / dtype
        own.mkdir()
        setting = Setting(own, int(arguments.images), GRID, int(arguments.dim), dtype, int(arguments.rounds))
        yield from store_lines(setting)
        sizes.append(size_line(setting))
        setting.path.unlink()
    yield ""
    yield "| stored | bytes of an image | above its values |"
    yield "|---|---|---|"
    yield from sizes
    yield ""
    yield "| uint8, activations of | 1 - cos of a token: mean | largest |"
    yield "|---|---|---|"
    given = arguments.activations
    activations = stored_activations(Path(given)) if given else demo_activations(directory / "teachers")
    for name, features in activations.items():
        mean, largest = quantization_error(features)
        yield f"| {name} | {mean:.1e} | {largest:.1e} |"


def overlap_report(arguments: Arguments, directory: Path) -> Iterator[str]:
    """Yield the table of a step's time."""
    size, batch, steps, rounds = (arguments.size, *map(int, (arguments.batch, arguments.steps, arguments.rounds)))
    yield "| targets | ms a step | times |"
    yield "|---|---|---|"
    yield from overlap_lines(Work(cast(Size, size), batch, steps, rounds), directory / "overlap")


def check(arguments: Arguments) -> None:
    """Refuse flags that cannot be. Errors: ConfigError names the first."""
    for flag, value, known in (
        *(("parts", part, PARTS) for part in arguments.parts.split(",")),
        *(("dtypes", dtype, get_args(StoreDtype)) for dtype in arguments.dtypes.split(",")),
        ("size", arguments.size, get_args(Size)),
    ):
        if value not in known:
            raise ConfigError(f"--{flag} {value} is none of {', '.join(known)}")
    for flag in ("images", "dim", "batch", "steps", "rounds"):
        value = getattr(arguments, flag)
        if not value.isdigit() or value == "0":
            raise ConfigError(f"--{flag} {value} must be a whole number, 1 or more")


def report(arguments: Arguments) -> Iterator[str]:
    """Yield the record line by line. Errors: as `check`, and ConfigError where --dir is missing."""
    check(arguments)
    torch.set_num_threads(1)
    yield "# The teacher plane, on CPU"
    yield ""
    yield f"{date.today()}, `python -m tools.bench.teachers {flags_of(arguments)}`; torch {version('torch')}, ray"
    yield f"{version('ray')}, one thread a process."
    with tempfile.TemporaryDirectory(dir=arguments.dir or None) as scratch:
        sections = {
            "store": lambda: store_report(arguments, Path(scratch)),
            "overlap": lambda: overlap_report(arguments, Path(scratch)),
            "cost": cost_lines,
        }
        for part in arguments.parts.split(","):
            yield ""
            yield from sections[part]()


if __name__ == "__main__":
    sys.exit(run_benchmark(sys.argv[1:], __doc__ or "", Arguments, report))
