"""CogViT: training and use of the vision encoder of GLM-5V-Turbo (arXiv 2604.26752).

Encode images of any size, packed end to end without padding:

    import torch
    from cogvit import CogViT, CogViTConfig, naflex_pack

    vit = CogViT(CogViTConfig()).eval()  # or CogViT.from_pretrained(DIR)
    images = [torch.rand(3, 480, 640) * 2 - 1, torch.rand(3, 720, 480) * 2 - 1]  # uint8 from 0 to 255 will do too
    pooled = vit.encode(images).pooled  # [N, D]; also of PIL images, uint8 arrays and paths
    pack = naflex_pack(images, patch_size=14, max_tokens=1024)
    features = vit.forward_packed(pack)  # patch_TD: of image n, rows cu_seqlens[n] to cu_seqlens[n + 1]; cls_ND

What is here, by purpose:

    encoder             CogViT, CogViTConfig, EncodedImages, Preprocessing
    images of any size  naflex_pack -> PackedImages -> PackedFeatures; naflex_collate, naflex_resize, naflex_target_size
    images and language VisionLanguageModel, ImageLimits, CausalLM, LanguageConfig, MmtpConfig, ExpertConfig,
                        RopeScaling, PackedSequence
    between the two     AdapterConfig, MLPAdapter, GlmAdapter, SwiGLUAdapter, ConvAdapter, insert_visual_tokens_mmtp,
                        save_glm_ocr
    stage 1             CogViTForMIM, TeacherWrapper
    stage 2             CogViTForContrastive, SigLIPLoss, TextTower, TextConfig, PackedText
    optimizer           build_param_groups, apply_lr_mult

Shape letters: B images of a dense batch, T patches of a pack, N images of a pack (or patches of an image, in [B, N]),
C channels, P patch size in px, D width, E shared space, L caption tokens. Float images are in [-1, 1].

`import cogvit` needs torch, einops and numpy, image files Pillow, weights safetensors; training starts with
`python -m cogvit.train`.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  pip refuses it, a checkout on the path cannot
    _told = f"cogvit needs Python 3.11 to 3.13, and {sys.executable} is {sys.version.split()[0]}"
    if sys.argv[0] != "-m":
        raise ImportError(_told)
    print(f"error: {_told}", file=sys.stderr)
    raise SystemExit(2)

from cogvit.batch import PackedImages, PackedSequence, PackedText
from cogvit.model.adapter import (
    ConvAdapter,
    GlmAdapter,
    MLPAdapter,
    SwiGLUAdapter,
    insert_visual_tokens_mmtp,
    save_glm_ocr,
)
from cogvit.model.config import AdapterConfig, CogViTConfig, ExpertConfig, MmtpConfig, TextConfig
from cogvit.model.contrastive import CogViTForContrastive, SigLIPLoss
from cogvit.model.image_input import ImageLimits
from cogvit.model.language import CausalLM
from cogvit.model.language_config import LanguageConfig, RopeScaling
from cogvit.model.mim import CogViTForMIM, TeacherWrapper
from cogvit.model.naflex import naflex_collate, naflex_pack, naflex_resize, naflex_target_size
from cogvit.model.param_groups import apply_lr_mult, build_param_groups
from cogvit.model.preprocess import EncodedImages, Preprocessing
from cogvit.model.text import TextTower
from cogvit.model.tokens import PackedFeatures
from cogvit.model.vit import CogViT
from cogvit.model.vlm import VisionLanguageModel

__all__ = [
    "AdapterConfig",
    "CausalLM",
    "CogViT",
    "CogViTConfig",
    "CogViTForContrastive",
    "CogViTForMIM",
    "ConvAdapter",
    "EncodedImages",
    "ExpertConfig",
    "GlmAdapter",
    "ImageLimits",
    "LanguageConfig",
    "MLPAdapter",
    "MmtpConfig",
    "PackedFeatures",
    "PackedImages",
    "PackedSequence",
    "PackedText",
    "Preprocessing",
    "RopeScaling",
    "SigLIPLoss",
    "SwiGLUAdapter",
    "TeacherWrapper",
    "TextConfig",
    "TextTower",
    "VisionLanguageModel",
    "apply_lr_mult",
    "build_param_groups",
    "insert_visual_tokens_mmtp",
    "naflex_collate",
    "naflex_pack",
    "naflex_resize",
    "naflex_target_size",
    "save_glm_ocr",
]
