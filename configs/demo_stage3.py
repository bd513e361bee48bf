"""Stage 3 of `make demo`: the encoder of stage 2 meets a tiny language model, on a laptop's CPU.

launch/local.sh 2 demo_stage3 --init runs/demo/stage2 --out runs/demo/stage3
"""

from cogvit.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LanguageTowerConfig,
    ModuleConfig,
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
        vision=demo_vision(),
        adapter=AdapterConfig("glm"),
        language=LanguageTowerConfig(path="runs/demo/language", max_tokens=96, max_patches=36),
        data=DataConfig(
            shards="runs/demo/corpus/train*/*.tar",
            eval_shards="runs/demo/corpus/heldout*/*.tar",
            mixture=(("pictograms", 0.4), ("digits", 0.3), ("questions", 0.3)),
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
        optim=OptimConfig(
            name="adamw",
            lr=2e-3,
            weight_decay=0.01,
            vision=ModuleConfig(lr_mult=0.5),
            language=ModuleConfig(lr_mult=0.5),
        ),
        schedule=ScheduleConfig(steps=240, warmup_steps=20),
        checkpoint=CheckpointConfig(every_steps=80),
        eval=EvalConfig(every_steps=80),
    )
