"""Small shards and indexes for the tests of the data plane."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from cogvit.batch import ShardVersion
from cogvit.config import DataConfig, RunConfig
from cogvit.model.config import CogViTConfig, TextConfig
from data_pipeline.index import Index, build_index, load_index
from data_pipeline.rules import Rules
from data_pipeline.table import ROW

PATCH_PX = 4
ANY_SIZE = Rules(min_side_px=1, max_aspect=1e9)


def picture(height_px, width_px, seed, image_format="PNG", **options):
    """An encoded picture of smooth random color."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width_px, height_px), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    image.save(data, image_format, **options)
    return data.getvalue()


def members(key, image, extension="png", **metadata):
    """The members of one sample with a json."""
    return [(f"{key}.{extension}", image), (f"{key}.json", json.dumps(metadata).encode())]


def write_tar(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_corpus(directory: Path, num_shards=3, per_shard=20):
    """Pictures of two sources, several sizes and formats, with captions of several lengths in two languages."""
    for shard in range(num_shards):
        entries = []
        for number in range(per_shard):
            seed = shard * per_shard + number
            extension, image_format = (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"))[seed % 3]
            entries += members(
                f"{number:04d}",
                picture(6 + 5 * (seed % 4), 5 + 7 * (seed % 3), seed, image_format),
                extension,
                source="red" if seed % 5 else "blue",
                captions={
                    "en": ["thing " * (1 + seed % 4), f"number {seed}"],
                    "zh": [f"第{seed}个"] if seed % 2 else [],
                },
            )
        write_tar(directory / f"train-{shard:05d}.tar", entries)
    return str(directory)


def indexed(directory: Path, num_shards=3, per_shard=20):
    pattern = write_corpus(directory, num_shards, per_shard)
    for _ in build_index(pattern, rules=ANY_SIZE):
        pass
    return load_index(pattern)


def run_config(**data):
    defaults = dict(
        global_batch_images=12,
        tokens_per_pack=64,
        images_per_pack=6,
        text_tokens_per_pack=80,
        max_patches=20,
        canonical_shares=4,
        lookahead_steps=2,
    )
    return RunConfig(
        objective="contrast",
        vision=CogViTConfig(image_size=4 * PATCH_PX, patch_size=PATCH_PX, embed_dim=32, num_heads=2, depth=1),
        text=TextConfig(max_tokens=16),
        data=DataConfig(**(defaults | data)),
        seed=7,
    )


def bare_index(source_sizes):
    """An index without files: so many samples of each source, sizes drawn, two English captions each."""
    size = sum(source_sizes)
    rng = np.random.default_rng(size)
    rows = np.zeros(size, ROW)
    rows["sample_id"] = rng.integers(-(2**63), 2**63, size)
    rows["height_px"], rows["width_px"] = rng.integers(1, 40, (2, size))
    rows["source"] = rng.permutation(np.repeat(np.arange(len(source_sizes)), source_sizes))
    rows["num_captions"][:, 0] = 2
    rows["caption_start"][:, 0] = 2 * np.arange(size)
    lengths = rng.integers(1, 40, 2 * size).astype(np.int32)
    keys = pa.chunked_array([pa.array([str(number) for number in range(size)], pa.string())])
    sources = tuple(f"source{number}" for number in range(len(source_sizes)))
    return Index(("shard.tar",), (ShardVersion(0, ""),), sources, keys, rows, (lengths, np.zeros(0, np.int32)))
