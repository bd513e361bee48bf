"""CogViT: training and use of the vision encoder of GLM-5V-Turbo (arXiv 2604.26752).

`import cogvit` needs torch alone. Here are the model and the reference build's classes; training starts with
`python -m cogvit.train`.
"""

from cogvit.batch import PackedImages, PackedText
from cogvit.model.adapter import GlmAdapter, MLPAdapter, insert_visual_tokens_mmtp, save_glm_ocr
from cogvit.model.config import CogViTConfig, TextConfig
from cogvit.model.contrastive import CogViTForContrastive, SigLIPLoss
from cogvit.model.mim import CogViTForMIM, TeacherWrapper
from cogvit.model.naflex import naflex_collate, naflex_pack, naflex_resize, naflex_target_size
from cogvit.model.param_groups import apply_lr_mult, build_param_groups
from cogvit.model.text import TextTower
from cogvit.model.tokens import PackedFeatures
from cogvit.model.vit import CogViT

__all__ = [
    "CogViT",
    "CogViTConfig",
    "CogViTForContrastive",
    "CogViTForMIM",
    "GlmAdapter",
    "MLPAdapter",
    "PackedFeatures",
    "PackedImages",
    "PackedText",
    "SigLIPLoss",
    "TeacherWrapper",
    "TextConfig",
    "TextTower",
    "apply_lr_mult",
    "build_param_groups",
    "insert_visual_tokens_mmtp",
    "naflex_collate",
    "naflex_pack",
    "naflex_resize",
    "naflex_target_size",
    "save_glm_ocr",
]
