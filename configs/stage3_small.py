"""Stage 3 on one machine: a small encoder of stage 2 meets SmolLM2-135M; first the adapter's images, then all at once.

python -m tools.make_demo_language_model smollm2 --out smollm2
python -m cogvit.train stage3_small --init RUN_OF_STAGE_2 --data.shards PATTERN --out OUT
"""

from cogvit.config import DataConfig, LanguageTowerConfig, ModuleConfig, OptimConfig, RunConfig, ScheduleConfig
from cogvit.model.config import AdapterConfig
from configs.models import cogvit_vision


def config() -> RunConfig:
    """Return the preset."""
    return RunConfig(
        objective="language",
        vision=cogvit_vision("small"),
        adapter=AdapterConfig("glm"),
        language=LanguageTowerConfig(path="smollm2", max_tokens=1024, max_patches=1024),
        data=DataConfig(
            held_out=0.01,
            global_batch_images=128,
            tokens_per_pack=8192,
            images_per_pack=64,
            full_packs=False,
            text_tokens_per_pack=8192,
            sizing="glm",
            min_patches=64,
            max_patches=256,
            grid_multiple=2,
        ),
        optim=OptimConfig(
            name="adamw",
            lr=2e-4,
            weight_decay=0.0,
            vision=ModuleConfig(lr_mult=0.1),
            adapter=ModuleConfig(lr_mult=5.0),
        ),
        schedule=ScheduleConfig(steps=4000, warmup_steps=120),
    )
