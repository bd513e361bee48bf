"""Machines that `tools.plan` can plan for: data-sheet figures and what of them training gets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cluster:
    """One kind of accelerator in its usual node; bandwidths are of one accelerator, in one direction."""

    flops: float  # dense bf16 peak, per second
    memory_bytes: float
    memory_bytes_per_s: float
    node_bytes_per_s: float  # inside a node
    network_bytes_per_s: float  # between nodes
    attained: (
        float  # share of the peak that the matrix products of a transformer reach; an assumption, not a measurement
    )


# Sources: data sheets of NVIDIA (A100 80 GB SXM, H100 SXM, H200 SXM); of HGX B200, RTX 4090 and 5090 (dense bf16 with
# fp32 sums; no NVLink: PCIe 4.0 and 5.0 x16, in nodes that share one port) what others quote from them. Data centers
# have one port of 200 or 400 Gbit/s an accelerator.
CLUSTERS = {
    "a100": Cluster(312e12, 80e9, 2.04e12, 300e9, 25e9, attained=0.7),
    "h100": Cluster(989e12, 80e9, 3.35e12, 450e9, 50e9, attained=0.6),
    "h200": Cluster(989e12, 141e9, 4.8e12, 450e9, 50e9, attained=0.6),
    "b200": Cluster(2250e12, 180e9, 8e12, 900e9, 50e9, attained=0.6),
    "rtx4090": Cluster(165e12, 24e9, 1.01e12, 25e9, 3e9, attained=0.8),
    "rtx5090": Cluster(210e12, 32e9, 1.79e12, 50e9, 3e9, attained=0.8),
}
