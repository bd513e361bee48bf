"""SmolLM2, frozen, behind the demo's encoder and a new adapter, for two cores and by hand; not run yet.

make demo-language, which runs

launch/local.sh 2 demo_language --init runs/demo/stage2 --out runs/demo/smollm2-sees
"""

from dataclasses import replace

from cogvit.config import CheckpointConfig, EvalConfig, ModuleConfig, OptimConfig, RunConfig, ScheduleConfig
from configs import demo_stage3


def config() -> RunConfig:
    """Return the preset."""
    base = demo_stage3.config()
    return replace(
        base,
        language=replace(base.language, path="runs/demo/smollm2"),
        data=replace(
            base.data,
            mixture=(("questions", 0.8), ("digits", 0.2)),
            zh_fraction=0.0,
            global_batch_images=16,
            tokens_per_pack=288,
            images_per_pack=9,
            text_tokens_per_pack=480,
        ),
        optim=OptimConfig(
            name="adamw",
            lr=1e-3,
            weight_decay=0.01,
            vision=ModuleConfig(lr_mult=0.1),
            language=ModuleConfig(lr_mult=0.0),
        ),
        schedule=ScheduleConfig(steps=150, warmup_steps=10),
        checkpoint=CheckpointConfig(every_steps=50),
        eval=EvalConfig(every_steps=50, steps=8),
    )
