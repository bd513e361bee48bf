"""Fits what standardizes the teachers' features, over a sample of the training images, for --teachers.stats FILE.

usage: python -m tools.fit_teacher_stats PRESET --out FILE [--images N] [flags of the trainer]

PRESET and flags are those of the runs that will read the file: their teachers, shards and sizes, whether features come
from actors or a store (--teachers.source), and how they are standardized (--teachers.standardize channel|phi_s). The
sample is what the run's plan begins with, so it mixes sources and sizes as training does. A file says which teachers it
was fitted on; a run with others refuses it.

  --images N  size of the sample (--teachers.stats-images by default, an epoch at most), rounded up to a whole pack.

A run that is given no file fits such a sample itself when it starts for the first time. A file is for several runs that
are to regress the same numbers, or for a larger sample.

Exit status: 0, or 2 when the configuration cannot run.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

from cogvit.config import RunConfig
from cogvit.config.arguments import asks_for_help, take_flag
from cogvit.config.split import train_part
from cogvit.errors import CogViTError, ConfigError
from cogvit.stages import check_recipe, read_run
from cogvit.stages.distill_targets import fit_sample, makers_of, open_source
from cogvit.teacher.actors import connect, plan_cluster
from cogvit.teacher.room import cpus_of
from cogvit.teacher.standardize import save_stats, try_place
from data_pipeline.index import open_index


def fit(config: RunConfig, num_images: int) -> None:
    """Fit the statistics of a configuration's teachers on num_images or an epoch and write them to config.out.

    Errors: ConfigError or DataError for teachers, shards or a store that do not serve.
    """
    if not config.out:
        raise ConfigError("--out FILE is needed: where the statistics go")
    out, teachers = Path(config.out), config.teachers
    if not teachers.members:
        raise ConfigError("the preset has no teachers; take one of stage 1")
    check_recipe(config)
    if out.is_dir():
        raise ConfigError(f"--out {out} is a directory; name a file in it")
    try_place(out)
    makers, index = makers_of(teachers), open_index(train_part(config.data), config.data.shards)
    with ExitStack() as stack:
        if teachers.source != "store":
            stack.enter_context(connect(plan_cluster(teachers.ray_address), cpus_of(teachers)))
        source = open_source(config, makers)
        fingerprints = {name: maker.fingerprint for name, maker in makers.items()}
        save_stats(out, fit_sample(config, index, source, fingerprints, num_images))
    images = min(num_images, len(index))
    print(f"{out}: {teachers.standardize} statistics of {', '.join(makers)}, of {images:,} images at least")


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    if not argv or asks_for_help(argv):
        print(__doc__)
        return 0 if argv else 2
    try:
        images, words = take_flag(argv[1:], "--images")
        if images is not None and not (images.isdecimal() and int(images) > 0):
            raise ConfigError(f"--images {images} must be a whole number above 0")
        config = read_run(argv[0], words)
        fit(config, int(images or config.teachers.stats_images))
    except CogViTError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
