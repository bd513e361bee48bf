"""The fields that say how a run is executed: its layout, memory, checkpoints, evaluations and logs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cogvit.config.option import option


@dataclass(frozen=True)
class ParallelConfig:
    """The layout: a performance choice that never changes the numbers, but for messages in bf16."""

    tp: int = option(1, "tensor-parallel ranks")
    pp: int = option(1, "pipeline stages")
    sequence: bool = option(False, "sequence parallelism over the tensor ranks")
    pipeline_messages: Literal["fp32", "bf16"] = option(
        "fp32", "what stages send each other; bf16 is half the bytes, and rounds the residual stream at every border"
    )
    step_timeout_s: float = option(
        600.0, "a step after the first that takes longer dumps all stacks and ends; 0: never"
    )

    def place(self, rank: int) -> tuple[int, int, int]:
        """Return a rank's place on the tp, pp and dp axes: tp is the fastest, dp the slowest."""
        replica_rank, dp_rank = rank % (self.tp * self.pp), rank // (self.tp * self.pp)
        return replica_rank % self.tp, replica_rank // self.tp, dp_rank


@dataclass(frozen=True)
class ActivationConfig:
    """What one tower keeps of its activations between forward and backward."""

    recompute: Literal["none", "selective", "full"] = option(
        "none", "done again in backward: nothing, attention and MLP inside each block, or whole blocks"
    )
    recompute_blocks: int = option(1, "full: blocks that are recomputed together; only their input is kept")
    offload: bool = option(False, "what is kept waits in host memory")


@dataclass(frozen=True)
class MemoryConfig:
    """Activation memory of each module; never changes the numbers."""

    vision: ActivationConfig = field(default_factory=ActivationConfig)
    text: ActivationConfig = field(default_factory=ActivationConfig)
    language: ActivationConfig = field(default_factory=ActivationConfig)
    projection_recompute: bool = option(False, "projections and distillation heads are done again in backward")


@dataclass(frozen=True)
class ZeroConfig:
    """DeepSpeed ZeRO."""

    stage: int = option(1, "1: optimizer state is sharded over dp; 2: gradients too, once they are reduced")
    overlap: bool = option(
        False, "without pp: average gradients beside a step's last backward, for twice the bytes of doing it afterwards"
    )
    gradient_messages: Literal["fp32", "bf16"] = option(
        "fp32", "what ranks send of gradients; bf16 is half the bytes, and sums over ranks are rounded to 8 bits"
    )
    reduce_bucket_elements: int = option(50_000_000, "gradients that are reduced together")
    gather_bucket_elements: int = option(500_000_000, "updated parameters that are gathered together")


@dataclass(frozen=True)
class CheckpointConfig:
    """When state is saved and what is kept."""

    dir: str = option("", "directory or fsspec URL (s3://bucket/one) of the checkpoints; empty: OUT/checkpoints")
    every_steps: int = option(1000, "0 saves at the end only, and by the clock")
    every_minutes: float = option(0.0, "saves too when the last one is so long ago, whatever the step; 0 never does")
    keep_last: int = option(2, "newest checkpoints that are kept (the best by evaluation is kept beside them)")
    keep_every_steps: int = option(0, "checkpoints of multiples of this are kept for good; 0 keeps none of them")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training, on data.eval_shards."""

    every_steps: int = option(0, "0 turns it off")
    steps: int = option(2, "global batches of one evaluation")


@dataclass(frozen=True)
class GuardConfig:
    """What happens when training goes wrong."""

    non_finite: Literal["raise", "skip"] = option(
        "raise", "a NaN or infinite loss or gradient stops the run, or is skipped"
    )
    max_skips: int = option(3, "skip: stop after so many steps in a row")
    spike_factor: float = option(2.0, "report a loss above this multiple of the recent median; 0: never")


@dataclass(frozen=True)
class LogConfig:
    """What is logged where; metrics.jsonl is always written."""

    every_steps: int = option(1, "steps between printed lines")
    wandb: Literal["auto", "off"] = option("auto", "auto: online when logged in, offline files otherwise")
    tensorboard: bool = option(False, "write OUT/logs/tensorboard too; tensorboard --logdir OUT shows it")
