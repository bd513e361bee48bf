"""Stage 4 of the demo: a policy that has seen a few right answers learns from what its own are worth, on a CPU.

launch/local.sh 1 demo_rl --init runs/demo_rl/start --out runs/demo_rl/policy
"""

from cogvit.config import (
    CheckpointConfig,
    DataConfig,
    OptimConfig,
    ReinforcementConfig,
    RunConfig,
    ScheduleConfig,
)
from configs import demo_rl_start


def config() -> RunConfig:
    """Return the preset."""
    start = demo_rl_start.config()
    return RunConfig(
        objective="policy",
        vision=start.vision,
        adapter=start.adapter,
        language=start.language,
        rl=ReinforcementConfig(tasks="digits,counting,reading", group=8, max_new_tokens=12),
        data=DataConfig(
            global_batch_images=192,
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
            lr=2e-4,
            weight_decay=0.0,
        ),
        schedule=ScheduleConfig(steps=100, warmup_steps=5, kind="constant"),
        checkpoint=CheckpointConfig(every_steps=50),
    )
