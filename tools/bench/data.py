"""Measures the data plane: what planning costs, and how even and how full its packs are.

Usage: python -m tools.bench.data

The cluster is simulated: every node of 64 and of 4,096 ranks plans its share of a few steps of 32 images a rank, across
the end of an epoch. Times are of one core.
"""

from __future__ import annotations

import sys

from tools.bench._planning import methods, table


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    if argv:
        print(__doc__)
        return 0 if argv[0] in ("-h", "--help") else 2
    for line in methods():
        print(line, flush=True)
    print()
    for line in table():
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
