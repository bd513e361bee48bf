"""CogAgent-18B's pretraining: a CogVLM of 224 px whose blocks also look at each image at 1120 px, by cross attention.

Published (arXiv 2312.08914): 60,000 steps of 4,608 at 2e-5, the first 20,000 of the cross module alone; here the visual
experts learn from the first step on, too. A new cross module changes nothing: the CogVLM of --init goes on.

sbatch launch/stage3.sh cogagent_18b --init RUN_OF_COGVLM --language.path VICUNA_7B --data.shards PATTERN --out OUT
"""

from dataclasses import replace

from cogvit.config import LanguageTowerConfig, ModuleConfig, OptimConfig, RunConfig, ScheduleConfig
from cogvit.model.config import CrossModuleConfig
from configs import cogvlm_17b
from configs.models import eva2_clip_e_vision


def config() -> RunConfig:
    """Return the preset."""
    base = cogvlm_17b.config()
    return replace(
        base,
        vision=eva2_clip_e_vision(224),
        language=LanguageTowerConfig(max_tokens=1024, max_patches=cogvlm_17b.AT_224_PX),
        cross=CrossModuleConfig(1120),
        data=replace(
            base.data,
            global_batch_images=4608,
            tokens_per_pack=4 * cogvlm_17b.AT_224_PX,
            images_per_pack=4,
            text_tokens_per_pack=4096,
            sizing="square",
            min_patches=0,
            max_patches=cogvlm_17b.AT_224_PX,
            budget_schedule=(),
        ),
        optim=OptimConfig(
            name="adamw",
            lr=2e-5,
            weight_decay=0.05,
            vision=ModuleConfig(lr_mult=0.0),
            language=ModuleConfig(lr_mult=0.0),
        ),
        schedule=ScheduleConfig(steps=60_000, warmup_steps=1000),
    )
