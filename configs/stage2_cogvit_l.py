"""Stage 2 of the 403M encoder (paper section 2.1): sigmoid loss, NaFlex, a global batch of 64K, English and Chinese.

    python -m cogvit.train stage2_cogvit_l --init runs/stage1 --data.shards '/data/{00000..99999}.tar' --out runs/stage2

The paper has rates of their own for vision, text and projection and publishes neither them nor steps: those here are
starting points, not its recipe. The encoder comes from stage 1, so its rate is the lowest; from scratch, pass
--optim.vision.lr-mult 1. One image in a thousand is held out, a batch of which needs 66 million.
"""

from cogvit.config import CheckpointConfig, DataConfig, EvalConfig, ModuleConfig, OptimConfig, RunConfig, ScheduleConfig
from configs.models import cogvit_l_vision, text_tower


def config() -> RunConfig:
    """Return the preset."""
    return RunConfig(
        objective="contrast",
        vision=cogvit_l_vision(),
        text=text_tower(),
        data=DataConfig(
            held_out=0.001,
            global_batch_images=65_536,
            tokens_per_pack=16_384,
            images_per_pack=64,
            text_tokens_per_pack=4_096,
            max_patches=1024,
            budgets_patches=(128, 256, 576, 784, 1024),
            canonical_shares=240,
            tokenizer="google/siglip2-so400m-patch16-naflex",
            decode_threads=4,
        ),
        optim=OptimConfig(lr=5e-4, adamw_lr=5e-4, vision=ModuleConfig(lr_mult=0.3)),
        schedule=ScheduleConfig(steps=120_000, warmup_steps=4_000),
        checkpoint=CheckpointConfig(every_steps=500, every_minutes=4.0, keep_last=3),
        eval=EvalConfig(every_steps=2_000, steps=1),
        precision="bf16",
    )
