"""Stage 1, small: one small GPU, or a CPU with --size tiny; images of up to 64 patches.

    python -m cogvit.train stage1_small --data.shards DIR --out runs/stage1

Rates and steps are guesses between the demo's, which were tried, and the full-size presets'.
"""

from cogvit.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TeacherConfig,
    TeachersConfig,
)
from configs.models import cogvit_vision


def config() -> RunConfig:
    """Return the preset."""
    return RunConfig(
        objective="distill",
        vision=cogvit_vision("small"),
        data=DataConfig(
            held_out=0.01,
            global_batch_images=128,
            tokens_per_pack=4096,
            images_per_pack=64,
            full_packs=False,
            max_patches=64,
            canonical_shares=4,
        ),
        teachers=TeachersConfig(
            members=(
                TeacherConfig(name="siglip2", path="google/siglip2-base-patch16-naflex"),
                TeacherConfig(name="dinov3", path="facebook/dinov3-vits16-pretrain-lvd1689m"),
            ),
            stats_images=1024,  # a CPU's teachers take a second for a few images
        ),
        optim=OptimConfig(lr=2e-3, adamw_lr=1e-3),
        schedule=ScheduleConfig(steps=10_000, warmup_steps=200),
        checkpoint=CheckpointConfig(every_steps=500, every_minutes=5.0),
        eval=EvalConfig(every_steps=500),
    )
