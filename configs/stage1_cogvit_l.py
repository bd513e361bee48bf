"""Stage 1 of the 403M encoder (paper section 2.1): 224 x 224, 35 % masked, SigLIP2 and DINOv3, Muon, cosine decay.

    python -m cogvit.train stage1_cogvit_l --data.shards '/data/{0000..4095}.tar' --out runs/stage1

The paper publishes neither rates, steps nor teacher checkpoints: those here are starting points, not its recipe. The
mixture is the paper's: 80 % natural images, 10 % instruction-following, 10 % scientific.
"""

from cogvit.config import (
    CheckpointConfig,
    DataConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TeacherConfig,
    TeachersConfig,
)
from configs.models import cogvit_l_vision


def config() -> RunConfig:
    """Return the preset."""
    return RunConfig(
        objective="distill",
        vision=cogvit_l_vision(),
        data=DataConfig(
            mixture=(("natural", 0.8), ("instruction", 0.1), ("scientific", 0.1)),
            global_batch_images=4096,
            tokens_per_pack=8192,
            images_per_pack=32,
            sizing="square",
            canonical_shares=120,
            decode_threads=4,
        ),
        teachers=TeachersConfig(
            members=(
                TeacherConfig(name="siglip2", path="google/siglip2-so400m-patch16-naflex"),
                TeacherConfig(name="dinov3", path="facebook/dinov3-vitl16-pretrain-lvd1689m"),
            ),
            precision="bf16",
        ),
        optim=OptimConfig(lr=1e-3, adamw_lr=1e-3),
        schedule=ScheduleConfig(steps=250_000, warmup_steps=5_000),
        checkpoint=CheckpointConfig(every_steps=1_000, every_minutes=4.0, keep_last=3),
        precision="bf16",
    )
