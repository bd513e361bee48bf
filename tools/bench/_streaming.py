"""What a start of MosaicML streaming costs: `python -m tools.bench._streaming DIR SHARDS IMAGES` prints it as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from tools.bench._memory import held_mb
from tools.bench._peers import name_torchvision_operators

ENVIRONMENT = {
    "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29777",
}  # fmt: skip


def write_index(directory: Path, num_shards: int, images_a_shard: int) -> None:
    """Write an index.json of shards that are holes."""
    directory.mkdir(parents=True)
    size_bytes = images_a_shard * 50_000
    shards = [
        {
            "column_encodings": ["bytes"], "column_names": ["x"], "column_sizes": [None], "compression": None,
            "format": "mds", "hashes": [], "samples": images_a_shard, "size_limit": 1 << 30, "version": 2,
            "raw_data": {"basename": f"shard.{number:05d}.mds", "bytes": size_bytes, "hashes": {}}, "zip_data": None,
        }
        for number in range(num_shards)
    ]  # fmt: skip
    (directory / "index.json").write_text(json.dumps({"shards": shards, "version": 2}))
    for number in range(num_shards):
        with (directory / f"shard.{number:05d}.mds").open("wb") as file:
            file.truncate(size_bytes)


def main(directory: Path, num_shards: int, images_a_shard: int) -> None:
    """Measure the dataset object and an epoch's order of its samples."""
    write_index(directory, num_shards, images_a_shard)
    os.environ.update(ENVIRONMENT)
    name_torchvision_operators()
    from streaming import StreamingDataset
    from streaming.base.world import World

    before_mb, start_s = held_mb(), time.process_time()
    dataset = StreamingDataset(
        local=str(directory), shuffle=True, num_canonical_nodes=64, batch_size=16, shuffle_block_size=1 << 18,
        allow_unsafe_types=True,
    )  # fmt: skip
    made_s = time.process_time()
    dataset._unique_worker_world = dataset._parallel_worker_world = World.detect()
    order = dataset._get_work(0, 0)  # which its iterator holds for an epoch: of one process, all samples
    figures = {"start_s": made_s - start_s, "order_s": time.process_time() - made_s}
    print(json.dumps(figures | {"before_mb": before_mb, "mb": held_mb() - before_mb, "order_mb": order.nbytes / 2**20}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
