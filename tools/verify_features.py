"""Reads every image of a feature store and names the files that are damaged or not what the manifests say.

usage: python -m tools.verify_features DIR

Exit status: 0, or 2 when something is wrong.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cogvit.config.arguments import run_command
from cogvit.errors import ConfigError, DataError
from cogvit.teacher.shard import open_shard
from cogvit.teacher.store import read_manifest

_LINE_EVERY_S = 10.0


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    directory: str


def verify_file(path: Path, manifest: dict[str, str]) -> int:
    """Read all features of a file; returns the number of images.

    Errors: DataError when a byte is not as it was written or the file is not the manifest's.
    """
    features, header = open_shard(path)
    wrong = sorted(field for field, value in manifest.items() if header.get(field) != value)
    if wrong:
        raise DataError(f"{path} was made with other {', '.join(wrong)} than manifest.json says; remove it")
    for sample_id in features.place:
        features.read(sample_id)
    return len(features.place)


def verify(arguments: Arguments) -> int:
    """Print a line for each damaged file and one for the store; returns the exit status.

    Errors: ConfigError when the directory is no store, or a manifest is gone or none.
    """
    files = Path(arguments.directory).glob("*/*.safetensors")
    manifests = set(Path(arguments.directory).glob("*/manifest.json")) | {
        path.with_name("manifest.json") for path in files
    }
    if not manifests:
        raise ConfigError(f"{arguments.directory} is no feature store: no TEACHER/manifest.json in it")
    num_damaged = 0
    for manifest in sorted(manifests):
        said = read_manifest(manifest, "remove the directory and make it again")
        num_images, paths = 0, sorted(manifest.parent.glob("*.safetensors"))
        next_line_s = time.monotonic() + _LINE_EVERY_S
        for number, path in enumerate(paths):
            if time.monotonic() >= next_line_s:
                print(f"{manifest.parent}: {number} of {len(paths)} files, {num_images:,} images", flush=True)
                next_line_s = time.monotonic() + _LINE_EVERY_S
            try:
                num_images += verify_file(path, said)
            except DataError as error:
                print(error, flush=True)
                num_damaged += 1
        num_bytes = sum(path.stat().st_size for path in paths)
        print(f"{manifest.parent}: {len(paths)} files, {num_images:,} images, {num_bytes / 2**20:,.1f} MiB")
    return 2 if num_damaged else 0


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], __doc__ or "", Arguments, verify))
