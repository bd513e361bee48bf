"""The pictures of Debian's openclipart-png: real odd sizes, palettes, alpha and symlinks index, filter and train."""

from __future__ import annotations

import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogvit.train import main
from cogvit.training.meter import read_metrics
from data_pipeline.index import build_index, load_index
from tests.data.corpus import keys_of, table_of
from tests.pool import Pool

PICTURES = Path("/usr/share/openclipart/png")
EVERY = 6  # of the pictures: all of them take a minute to write and index

pytestmark = pytest.mark.skipif(not PICTURES.is_dir(), reason="openclipart-png is not installed (apt-get install it)")


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar as `tar` would write it, symlinks included, with the names as captions."""
    path = tmp_path_factory.mktemp("openclipart") / "clipart.tar"
    with tarfile.open(path, "w") as archive:
        for number, picture in enumerate(sorted(PICTURES.rglob("*.png"))[::EVERY]):
            archive.add(picture, f"{number:05d}.png", recursive=False)
            caption = path.parent / "caption.txt"
            caption.write_text(picture.stem.replace("_", " "))
            archive.add(caption, f"{number:05d}.txt")
    return path


def test_sizes_are_pillows_and_links_and_slivers_are_left_out(shard: Path) -> None:
    (report,) = build_index(str(shard))
    files = sorted(PICTURES.rglob("*.png"))[::EVERY]
    index = load_index(str(shard), duplicates="drop")
    links = {number for number, picture in enumerate(files) if picture.is_symlink()}
    keys, sizes = [int(key) for key in keys_of(index)], table_of(index)
    assert links and links.isdisjoint(keys)
    assert report.problems["captions without an image"] >= len(links)
    assert report.problems["the aspect ratio is beyond 6"] > 0
    assert report.problems["a link, device or sparse file, which is not followed"] == len(links)
    assert report.num_images + sum(report.problems.values()) - report.problems["captions without an image"] == len(
        files
    )
    assert len(index) > 0.7 * (len(files) - len(links))
    for row in range(0, len(index), 40):
        with Image.open(files[keys[row]]) as image:
            assert image.size == (sizes["width_px"][row], sizes["height_px"][row])
    sides = np.stack([sizes["height_px"], sizes["width_px"]])
    assert (sides.max(0) <= 6 * sides.min(0)).all()


def train_on_rank(rank: int, world: int, argv: list[str]) -> int:
    return main(argv)


def test_they_train(shard: Path, pool: Pool, tmp_path: Path) -> None:
    list(build_index(str(shard)))
    argv = ["demo_stage2", "--data.shards", str(shard), "--out", str(tmp_path / "run"), "--schedule.steps", "2"]
    argv += ["--eval.every-steps", "0", "--log.wandb", "off", "--data.global-batch-images", "32"]
    argv += ["--data.tokens-per-pack", "1152", "--data.images-per-pack", "32", "--data.text-tokens-per-pack", "1024"]
    assert pool.run(train_on_rank, 2, (argv,), timeout_s=100.0) == [0, 0]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(line["images"], line["failed_images"]) for line in lines] == [(32, 0)] * 2
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0.0 for line in lines)
