"""Shapes of the towers that the presets share."""

from cogvit.model.config import CogViTConfig, TextConfig


def demo_vision() -> CogViTConfig:
    """0.9M parameters: what a CPU trains in minutes."""
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
        position="learned",
    )


def demo_text() -> TextConfig:
    """A byte-level tower to go with it."""
    return TextConfig(embed_dim=128, depth=2, num_heads=4, max_tokens=48)
