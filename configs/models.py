"""Shapes of the towers that the presets share."""

from cogvit.model.config import SHAPES, CogViTConfig, Size, TextConfig

__all__ = [
    "Size",
    "byte_text",
    "cogvit_l_vision",
    "cogvit_vision",
    "demo_text",
    "demo_vision",
    "eva2_clip_e_vision",
    "reference_vision",
    "text_tower",
]


def reference_vision(size: Size = "large") -> CogViTConfig:
    """Return the published reference build's options; its own size is large, 303M parameters and all defaults."""
    width, depth, heads, mlp = SHAPES[size]
    return CogViTConfig(embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=mlp / width)


def cogvit_vision(size: Size = "large") -> CogViTConfig:
    """Return the options of GLM-5V-Turbo's encoder, which transformers' GlmOcrVisionModel has; large is `cogvit_l`.

    SwiGLU has three matrices of the MLP's width where GELU has two, so a size has a third more parameters.
    """
    width, depth, heads, mlp = SHAPES[size]
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


def eva2_clip_e_vision(image_size: int) -> CogViTConfig:
    """Return EVA2-CLIP-E as the CogVLM family has it, without its last block: 4.4B parameters; image_size in px."""
    return CogViTConfig(
        image_size=image_size,
        embed_dim=1792,
        depth=63,
        num_heads=16,
        mlp_ratio=15360 / 1792,
        use_qk_norm=False,
        norm_after=True,
    )


def text_tower(size: Size = "base") -> TextConfig:
    """Return a text tower of a size; the paper does not publish its own. 256K ids fit SigLIP2's Gemma tokenizer."""
    width, depth, heads, mlp = SHAPES[size]
    return TextConfig(
        vocab_size=256_000, max_tokens=64, embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=mlp / width
    )


def byte_text(size: Size = "small") -> TextConfig:
    """Return a text tower that reads bytes and needs no tokenizer's files; two bytes or three are a character."""
    width, depth, heads, mlp = SHAPES[size]
    return TextConfig(max_tokens=96, embed_dim=width, depth=depth // 2, num_heads=heads, mlp_ratio=mlp / width)


def demo_vision() -> CogViTConfig:
    """Under a million parameters, of the family of `cogvit_l`, which transformers loads; a CPU trains it in minutes."""
    return CogViTConfig(
        image_size=40,
        patch_size=8,
        embed_dim=128,
        depth=4,
        num_heads=4,
        use_cls_token=False,
        norm="rmsnorm",
        mlp="swiglu",
        position="rotary",
        eps=1e-5,
        mlp_ratio=2.0,
    )


def demo_text() -> TextConfig:
    """A byte-level tower to go with it."""
    return TextConfig(embed_dim=128, depth=2, num_heads=4, max_tokens=48)
