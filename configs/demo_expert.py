"""Visual experts beside the demo's tiny language model, which stays as it is to the bit.

python -m cogvit.train demo_expert --init runs/demo/stage2 --out runs/demo/expert
"""

from dataclasses import replace

from cogvit.config import ModuleConfig, OptimConfig, RunConfig, ScheduleConfig
from cogvit.model.config import AdapterConfig, ExpertConfig
from configs import demo_stage3


def config() -> RunConfig:
    """Return the preset."""
    return replace(
        demo_stage3.config(),
        adapter=AdapterConfig("conv"),
        expert=ExpertConfig(1, qkv_bias=True),
        optim=OptimConfig(
            lr=4e-3,
            adamw_lr=2e-3,
            weight_decay=0.01,
            vision=ModuleConfig(lr_mult=0.5),
            language=ModuleConfig(lr_mult=0.0),
        ),
        schedule=ScheduleConfig(steps=120, warmup_steps=10),
    )
