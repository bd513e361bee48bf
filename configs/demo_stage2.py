"""Stage 2 of `make demo`: the encoder of stage 1 meets captions in two languages, on a laptop's CPU.

launch/local.sh 2 demo_stage2 --init runs/demo/stage1 --out runs/demo/stage2
"""

from cogvit.config import CheckpointConfig, DataConfig, EvalConfig, ModuleConfig, OptimConfig, RunConfig, ScheduleConfig
from configs.models import demo_text, demo_vision


def config() -> RunConfig:
    """Return the preset."""
    return RunConfig(
        objective="contrast",
        vision=demo_vision(),
        text=demo_text(),
        proj_dim=128,
        data=DataConfig(
            shards="runs/demo/corpus/train/*.tar",
            eval_shards="runs/demo/corpus/heldout/*.tar",
            global_batch_images=256,
            tokens_per_pack=3840,
            images_per_pack=136,
            full_packs=False,
            text_tokens_per_pack=4096,
            max_patches=36,
            canonical_shares=2,
        ),
        optim=OptimConfig(
            lr=1e-2, adamw_lr=2e-3, temperature=ModuleConfig(lr_mult=2.0), bias=ModuleConfig(lr_mult=2.0)
        ),
        schedule=ScheduleConfig(steps=320, warmup_steps=20),
        checkpoint=CheckpointConfig(every_steps=160),
        eval=EvalConfig(every_steps=160),
    )
