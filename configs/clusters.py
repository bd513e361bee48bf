"""Machines that `tools.plan` can plan for: data-sheet figures and what of them training gets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cluster:
    """One kind of accelerator in its usual node; bandwidths are of one accelerator, in one direction."""

    flops: float  # dense bf16 peak, per second
    memory_bytes: float
    node_bytes_per_s: float  # inside a node
    network_bytes_per_s: float  # between nodes
    attained: (
        float  # share of the peak that the matrix products of a transformer reach; an assumption, not a measurement
    )


# Sources: NVIDIA's data sheets of A100 80 GB SXM, H100 SXM and H200 SXM; one 200 or 400 Gbit/s port an accelerator.
CLUSTERS = {
    "a100": Cluster(312e12, 80e9, 300e9, 25e9, attained=0.5),
    "h100": Cluster(989e12, 80e9, 450e9, 50e9, attained=0.45),
    "h200": Cluster(989e12, 141e9, 450e9, 50e9, attained=0.45),
}
