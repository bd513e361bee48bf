"""Stage 2, small: one small GPU, or a CPU with --size tiny; images of up to 64 patches, captions as bytes.

    python -m cogvit.train stage2_small --data.shards DIR --out runs/mine

Rates and steps are guesses between the demo's, which were tried, and the full-size presets'.
"""

from cogvit.config import CheckpointConfig, DataConfig, EvalConfig, ModuleConfig, OptimConfig, RunConfig, ScheduleConfig
from configs.models import byte_text, cogvit_vision


def config() -> RunConfig:
    """Return the preset."""
    return RunConfig(
        objective="contrast",
        vision=cogvit_vision("small"),
        text=byte_text("small"),
        proj_dim=256,
        data=DataConfig(
            held_out=0.01,
            global_batch_images=128,
            tokens_per_pack=4096,
            images_per_pack=64,
            full_packs=False,
            text_tokens_per_pack=4096,
            max_patches=64,
            canonical_shares=4,
        ),
        optim=OptimConfig(
            lr=5e-3, adamw_lr=1e-3, temperature=ModuleConfig(lr_mult=2.0), bias=ModuleConfig(lr_mult=2.0)
        ),
        schedule=ScheduleConfig(steps=10_000, warmup_steps=50),
        checkpoint=CheckpointConfig(every_steps=500, every_minutes=5.0),
        eval=EvalConfig(every_steps=500),
    )
