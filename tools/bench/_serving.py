"""When to compute a teacher's features once and when to serve them: what both cost, as a pure function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SECONDS_PER_HOUR = 3600
VALUE_BYTES = 2  # bf16 or fp16, on disk and on the way


@dataclass(frozen=True)
class Tower:
    """A student or a teacher, as far as its cost goes."""

    name: str
    parameters: float
    tokens: int  # of an image
    dim: int  # of a feature

    @property
    def forward_flops(self) -> float:
        """Of an image."""
        return 2 * self.parameters * self.tokens


@dataclass(frozen=True)
class Node:
    """What the job runs on; rates are what one node gets while all others do the same."""

    gpus: int
    gpu_flops_per_s: float  # that a tower reaches, not the data sheet's
    disk_bytes_per_s: float
    network_bytes_per_s: float


@dataclass(frozen=True)
class Run:
    """How much is trained."""

    images: float  # of the corpus
    epochs: float
    mask_ratio: float


@dataclass(frozen=True)
class Cost:
    """Both ways beside each other."""

    student_hours: float  # of a GPU, in training alone
    serving_hours: float  # of a GPU, in the teacher's forward for every image of every epoch
    precompute_hours: float  # of a GPU, once
    stored_bytes: float
    read_load: float  # share of the node's disk that reading features takes at the student's pace
    network_load: float  # share of the node's network that masked features take when they are served

    @property
    def advice(self) -> str:
        """What is cheaper among what keeps up."""
        store_keeps_up, serving_keeps_up = self.read_load <= 1, self.network_load <= 1
        if store_keeps_up and (self.precompute_hours < self.serving_hours or not serving_keeps_up):
            return "precompute"
        return "serve" if serving_keeps_up else "neither keeps up"


def cost_of(student: Tower, teacher: Tower, node: Node, run: Run) -> Cost:
    """Return what a teacher costs a run when it is served and when its features are stored.

    Training is three forwards. The teacher's features lie on the student's grid; a store has those of every token,
    while an actor sends those of masked ones. Augmentation that changes what the teacher sees leaves serving alone.
    """
    trained, hour = run.images * run.epochs, node.gpu_flops_per_s * SECONDS_PER_HOUR
    images_per_s = node.gpus * node.gpu_flops_per_s / (3 * student.forward_flops)
    feature_bytes = student.tokens * teacher.dim * VALUE_BYTES
    return Cost(
        student_hours=trained * 3 * student.forward_flops / hour,
        serving_hours=trained * teacher.forward_flops / hour,
        precompute_hours=run.images * teacher.forward_flops / hour,
        stored_bytes=run.images * feature_bytes,
        read_load=images_per_s * feature_bytes / node.disk_bytes_per_s,
        network_load=images_per_s * feature_bytes * run.mask_ratio / node.network_bytes_per_s,
    )


STUDENT = Tower("CogViT-L", 403e6, 256, 1024)
TEACHERS = (
    Tower("DINOv3 ViT-L/16", 304e6, 256, 1024),
    Tower("SigLIP2 so400m", 414e6, 256, 1152),
    Tower("DINOv3 ViT-7B/16", 6716e6, 256, 4096),
)
NODES = (
    Node(gpus=8, gpu_flops_per_s=300e12, disk_bytes_per_s=1e9, network_bytes_per_s=3e9),
    Node(gpus=8, gpu_flops_per_s=300e12, disk_bytes_per_s=5e9, network_bytes_per_s=3e9),
    Node(gpus=8, gpu_flops_per_s=300e12, disk_bytes_per_s=20e9, network_bytes_per_s=40e9),
)
EPOCHS = (1, 4)
IMAGES = 100e6


def cost_lines() -> Iterator[str]:
    """Yield the table of a few teachers, disks and networks."""
    yield (
        "| teacher | epochs | disk, network GB/s a node | GPU h: student | served | once | store TB | disk load"
        " | network load | advice |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for teacher in TEACHERS:
        for epochs in EPOCHS:
            for node in NODES:
                cost = cost_of(STUDENT, teacher, node, Run(IMAGES, epochs, mask_ratio=0.35))
                yield (
                    f"| {teacher.name} | {epochs} | {node.disk_bytes_per_s / 1e9:g}, {node.network_bytes_per_s / 1e9:g}"
                    f" | {cost.student_hours:,.0f} | {cost.serving_hours:,.0f} | {cost.precompute_hours:,.0f}"
                    f" | {cost.stored_bytes / 1e12:,.0f} | {cost.read_load:.0%} | {cost.network_load:.0%}"
                    f" | {cost.advice} |"
                )
