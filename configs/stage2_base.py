"""Stage 2, base: one GPU or one node; NaFlex up to 256 patches, captions as bytes, in bf16.

    launch/local.sh 8 stage2_base --init runs/stage1 --data.shards DIR --out runs/stage2

Rates and steps are guesses between the demo's, which were tried, and the full-size presets'; the encoder comes from a
stage 1, so its rate is the lowest (from scratch, pass --optim.vision.lr-mult 1).
"""

from dataclasses import replace

from cogvit.config import CheckpointConfig, DataConfig, EvalConfig, ModuleConfig, OptimConfig, RunConfig, ScheduleConfig
from configs.models import byte_text, cogvit_vision
from configs.stage2_small import config as small_config


def config() -> RunConfig:
    """Return the preset."""
    return replace(
        small_config(),
        vision=cogvit_vision("base"),
        text=byte_text("base"),
        proj_dim=512,
        data=DataConfig(
            held_out=0.01,
            global_batch_images=4096,
            tokens_per_pack=16_384,
            images_per_pack=128,
            text_tokens_per_pack=12_288,
            max_patches=256,
            canonical_shares=8,
            decode_threads=4,
        ),
        optim=OptimConfig(lr=2e-3, adamw_lr=1e-3, vision=ModuleConfig(lr_mult=0.3)),
        schedule=ScheduleConfig(steps=50_000, warmup_steps=1_000),
        checkpoint=CheckpointConfig(every_steps=1_000, every_minutes=10.0),
        eval=EvalConfig(every_steps=1_000),
        precision="bf16",
    )
