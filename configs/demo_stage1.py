"""Stage 1 of `make demo`: two small untrained teachers distilled into a 1M-parameter encoder, on a laptop's CPU.

launch/local.sh 2 demo_stage1 --parallel.tp 2 --out runs/demo/stage1
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
from configs.models import demo_vision


def config() -> RunConfig:
    """Return the preset."""
    return RunConfig(
        objective="distill",
        vision=demo_vision(),
        data=DataConfig(
            shards="runs/demo/corpus/train/*.tar",
            eval_shards="runs/demo/corpus/heldout/*.tar",
            global_batch_images=128,
            tokens_per_pack=1920,
            images_per_pack=72,
            full_packs=False,
            max_patches=36,
            canonical_shares=2,
        ),
        teachers=TeachersConfig(
            members=(
                TeacherConfig(name="siglip2", path="runs/demo/teachers/siglip2"),
                TeacherConfig(name="dinov3", path="runs/demo/teachers/dinov3"),
            ),
            visible_weight=1.0,
            stats_images=1024,
        ),
        optim=OptimConfig(lr=2e-3, adamw_lr=2e-3),
        schedule=ScheduleConfig(steps=120, warmup_steps=10),
        checkpoint=CheckpointConfig(every_steps=60),
        eval=EvalConfig(every_steps=60),
    )
