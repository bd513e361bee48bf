"""Measures the data plane: planning, balance and loading.

usage: python -m tools.bench.data

Planning: the cluster is simulated; every node of 64 and of 4,096 ranks plans its share of a few steps of 32 images a
rank, across the end of an epoch. Times are of one core.
Loading: images a second from JPEG shards to packs of patches, beside PyTorch's DataLoader over webdataset and Pillow in
one process, taking turns.
Serving: what an image costs the rank that trains on it, decoded by itself or taken from the batch server of its node.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from tools.bench import _loading
from tools.bench._planning import methods, table


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    if argv:
        print(__doc__)
        return 0 if argv[0] in ("-h", "--help") else 2
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        for section in (methods(), table(), _loading.table(Path(directory)), _loading.serving(Path(directory))):
            for line in section:
                print(line, flush=True)
            print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
