"""Shapes of the towers that the presets share."""

from cogvit.model.config import CogViTConfig, TextConfig


def reference_vision() -> CogViTConfig:
    """303M parameters: the published reference build, which is CogViTConfig's defaults."""
    return CogViTConfig()


def cogvit_l_vision() -> CogViTConfig:
    """403M parameters: the encoder of GLM-5V-Turbo, in the layout of transformers' GlmOcrVisionModel."""
    return CogViTConfig(norm="rmsnorm", mlp="swiglu", position="rotary", use_cls_token=False, eps=1e-5)


def base_text() -> TextConfig:
    """The width of a ViT-B; the paper does not publish its text tower. 256K ids fit SigLIP2's Gemma tokenizer."""
    return TextConfig(vocab_size=256_000, max_tokens=64, embed_dim=768, depth=12, num_heads=12)


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
