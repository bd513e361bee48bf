"""Shapes of the towers that the presets share."""

from typing import Literal

from cogvit.model.config import CogViTConfig, TextConfig

Size = Literal["tiny", "small", "base", "large", "so400m"]

# Width, depth, heads and hidden width of the MLP. Source: ViT (Dosovitskiy et al. 2021), DeiT (Touvron et al. 2021) for
# tiny and small, SoViT-400m/14 (Alabdulmohsin et al. 2023).
_SHAPES: dict[Size, tuple[int, int, int, int]] = {
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
}


def reference_vision(size: Size = "large") -> CogViTConfig:
    """Return the published reference build's options; its own size is large, 303M parameters and all defaults."""
    width, depth, heads, mlp = _SHAPES[size]
    return CogViTConfig(embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=mlp / width)


def cogvit_vision(size: Size = "large") -> CogViTConfig:
    """Return the options of GLM-5V-Turbo's encoder, which transformers' GlmOcrVisionModel has; large is `cogvit_l`.

    SwiGLU has three matrices of the MLP's width where GELU has two, so a size has a third more parameters.
    """
    width, depth, heads, mlp = _SHAPES[size]
    return CogViTConfig(
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp / width,
        norm="rmsnorm",
        mlp="swiglu",
        position="rotary",
        use_cls_token=False,
        eps=1e-5,
    )


def cogvit_l_vision() -> CogViTConfig:
    """Return the 403M encoder of GLM-5V-Turbo."""
    return cogvit_vision("large")


def text_tower(size: Size = "base") -> TextConfig:
    """Return a text tower of a size; the paper does not publish its own. 256K ids fit SigLIP2's Gemma tokenizer."""
    width, depth, heads, mlp = _SHAPES[size]
    return TextConfig(
        vocab_size=256_000, max_tokens=64, embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=mlp / width
    )


def demo_vision() -> CogViTConfig:
    """Under a million parameters: what a CPU trains in minutes."""
    return CogViTConfig(
        image_size=40,
        patch_size=8,
        embed_dim=128,
        depth=4,
        num_heads=4,
        use_cls_token=False,
        norm="rmsnorm",
        mlp="swiglu",
        mlp_ratio=2.0,
    )


def demo_text() -> TextConfig:
    """A byte-level tower to go with it."""
    return TextConfig(embed_dim=128, depth=2, num_heads=4, max_tokens=48)
