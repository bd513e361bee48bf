"""What the demo's stage 4 begins with: stage 3 on right answers to its tasks, from nothing.

launch/local.sh 2 demo_rl_start --out runs/demo_rl/start
"""

from dataclasses import replace

from cogvit.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LanguageTowerConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
)
from cogvit.model.config import AdapterConfig
from configs.models import demo_vision


def config() -> RunConfig:
    """Return the preset."""
    return RunConfig(
        objective="language",
        vision=replace(demo_vision(), depth=2),
        adapter=AdapterConfig("glm"),
        language=LanguageTowerConfig(path="runs/demo_rl/tasks/language", max_tokens=96, max_patches=72),
        data=DataConfig(
            shards="runs/demo_rl/tasks/train/*.tar",
            eval_shards="runs/demo_rl/tasks/heldout/*.tar",
            mixture=(("digits", 0.35), ("counting", 0.04), ("reading", 0.61)),  # dots are soon counted
            global_batch_images=64,
            tokens_per_pack=1152,
            images_per_pack=36,
            full_packs=False,
            text_tokens_per_pack=896,
            sizing="glm",
            min_patches=16,
            max_patches=36,
            grid_multiple=2,
            canonical_shares=2,
        ),
        optim=OptimConfig(lr=4e-3, adamw_lr=2e-3),
        schedule=ScheduleConfig(steps=300, warmup_steps=20, kind="constant"),
        checkpoint=CheckpointConfig(every_steps=150),
        eval=EvalConfig(every_steps=50),
    )
