"""Stage 1, base: one GPU or one node; squares of 224 px, SigLIP2 and DINOv3 in bf16.

    launch/local.sh 8 stage1_base --data.shards DIR --out runs/stage1

Rates and steps are guesses between the demo's, which were tried, and the full-size presets'.
"""

from dataclasses import replace

from cogvit.config import CheckpointConfig, EvalConfig, OptimConfig, RunConfig, ScheduleConfig
from configs.models import cogvit_vision
from configs.stage1_cogvit_l import config as cogvit_l_config


def config() -> RunConfig:
    """Return the preset."""
    large = cogvit_l_config()
    return replace(
        large,
        vision=cogvit_vision("base"),
        data=replace(large.data, mixture=(), held_out=0.01, global_batch_images=1024, canonical_shares=8),
        optim=OptimConfig(lr=1.5e-3, adamw_lr=1e-3),
        schedule=ScheduleConfig(steps=50_000, warmup_steps=1_000),
        checkpoint=CheckpointConfig(every_steps=1_000, every_minutes=10.0),
        eval=EvalConfig(every_steps=1_000),
    )
