"""Stage 4 of the demo: a policy that has seen a few right answers learns from what its own are worth, on a CPU.

launch/local.sh 1 demo_rl --init runs/demo_rl/start --out runs/demo_rl/policy
"""

from cogvit.config import (
    CheckpointConfig,
    DataConfig,
    LanguageTowerConfig,
    ModuleConfig,
    OptimConfig,
    ReinforcementConfig,
    RunConfig,
    ScheduleConfig,
)
from cogvit.model.config import AdapterConfig
from configs.models import demo_vision


def config() -> RunConfig:
    """Return the preset."""
    return RunConfig(
        objective="policy",
        vision=demo_vision(),
        adapter=AdapterConfig("glm"),
        language=LanguageTowerConfig(path="runs/demo_rl/tasks/language", max_tokens=96, max_patches=72),
        rl=ReinforcementConfig(tasks="digits,counting,reading", group=8, max_new_tokens=12),
        data=DataConfig(
            global_batch_images=96,
            tokens_per_pack=576,
            images_per_pack=64,
            full_packs=False,
            text_tokens_per_pack=1280,
            sizing="glm",
            min_patches=16,
            max_patches=36,
            grid_multiple=2,
        ),
        optim=OptimConfig(
            name="adamw",
            lr=5e-4,
            weight_decay=0.0,
            vision=ModuleConfig(lr_mult=0.5),
            language=ModuleConfig(lr_mult=0.5),
        ),
        schedule=ScheduleConfig(steps=100, warmup_steps=5, kind="constant"),
        checkpoint=CheckpointConfig(every_steps=50),
    )
