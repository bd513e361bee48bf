"""Small shards and indexes for the tests of the data plane."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from cogvit.config import DataConfig, RunConfig
from cogvit.model.config import CogViTConfig, TextConfig
from data_pipeline.index import Index, build_index, load_index
from data_pipeline.merge import Entry, temporary_corpus
from data_pipeline.rules import Rules
from data_pipeline.select import Choice, select
from data_pipeline.table import MORE_COLUMNS, SCHEMA

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


def bare_index(source_sizes, images_a_shard=1 << 30, sort=False):
    """An index without files: so many samples of each source, sizes drawn, two English captions each."""
    size = sum(source_sizes)
    rng = np.random.default_rng(size)
    columns = {name: np.zeros(size, np.int64) for name in SCHEMA.names}
    columns["sample_id"] = rng.integers(-(2**63), 2**63, size)
    columns["height_px"], columns["width_px"] = rng.integers(1, 40, (2, size))
    source = rng.permutation(np.repeat(np.arange(len(source_sizes)), source_sizes))
    if sort:
        columns["height_px"].sort()
    columns["key"] = np.arange(size).astype(str)
    columns["source"] = np.char.add("source", source.astype(str))
    columns["format"] = np.full(size, "png")
    every_other = pa.array(np.arange(0, 2 * size + 1, 2, dtype=np.int32))
    columns["en_bytes"] = pa.ListArray.from_arrays(
        every_other, pa.array(rng.integers(1, 40, 2 * size).astype(np.int32))
    )
    for name in ("zh_bytes", *(f"more_{name}" for name in MORE_COLUMNS)):
        columns[name] = pa.array([[]] * size, SCHEMA.field(name).type)
    table = pa.table({name: columns[name] for name in SCHEMA.names}).cast(SCHEMA)
    facts = {"version": {"size_bytes": 0, "mark": ""}}
    shards = (
        (Entry(f"{start:09d}.tar", 0), table.slice(start, images_a_shard).combine_chunks(), facts)
        for start in range(0, size, images_a_shard)
    )
    corpus = temporary_corpus("", shards)
    return Index(corpus, select(corpus, Choice()))


def table_of(index):
    """The rows of an index, all of them."""
    return index.take(index.rows_of())


def source_of(index):
    """The number of each used row's source, by the names' order."""
    names = np.array(index.corpus.sources["name"].to_pylist())[table_of(index)["source"]]
    return np.searchsorted(np.array(index.sources), names)


def keys_of(index):
    """The keys of an index."""
    return [index.name(row).rpartition(":")[2] for row in index.rows_of()]
