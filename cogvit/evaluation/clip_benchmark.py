"""A stage-2 run in the form that LAION's clip_benchmark takes: a model, a transform and a tokenizer.

    from clip_benchmark.metrics import zeroshot_classification
    model, transform, tokenizer = load_for_clip_benchmark(Path("runs/stage2"), "cpu")
    zeroshot_classification.evaluate(model, dataloader, tokenizer, classnames, templates, "cpu")

Images are squares of the tower's image size, because the suite stacks them; `python -m cogvit.evaluate` takes any
shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cogvit.config import load_config
from cogvit.errors import ConfigError
from cogvit.model.naflex import resize_to_grid
from cogvit.training.restore import Towers, is_run, load_towers
from data_pipeline.caption import Tokenizer, load_tokenizer

_NO_TOKEN = -1  # fills the rows of shorter captions; no tokenizer has it


class EmbeddingModel(nn.Module):
    """The two towers with their projections; embeddings are not normalized."""

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        assert towers.text is not None and towers.vision_proj is not None and towers.text_proj is not None
        self.vision, self.text = towers.vision, towers.text
        self.vision_proj, self.text_proj = towers.vision_proj, towers.text_proj

    def encode_image(self, images: Tensor) -> Tensor:
        """Return [B, E] of images [B, 3, side, side] as `SquareTransform` makes them."""
        return self.vision_proj(self.vision(images)["patch_tokens"].mean(dim=1))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return [B, E] of token ids [B, L] as `PaddedTokenizer` makes them."""
        valid = tokens != _NO_TOKEN
        return self.text_proj(self.text(tokens.clamp(min=0), valid))


@dataclass(frozen=True)
class SquareTransform:
    """A Pillow image to [3, side, side] in [-1, 1]."""

    side_px: int

    def __call__(self, image: Image.Image) -> Tensor:
        """Resize one image, bilinear and antialiased, whatever its shape."""
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        return resize_to_grid(pixels, (self.side_px, self.side_px), patch_size=1) / 127.5 - 1.0


@dataclass(frozen=True)
class PaddedTokenizer:
    """Texts to rows of ids of one length."""

    tokenizer: Tokenizer
    max_tokens: int

    def __call__(self, texts: list[str]) -> Tensor:
        """Return [B, L] int64; longer texts lose their end."""
        ids = [torch.from_numpy(self.tokenizer.encode(text, self.max_tokens).ids) for text in texts]
        return pad_sequence(ids, batch_first=True, padding_value=_NO_TOKEN)


def load_for_clip_benchmark(run: Path, device: str) -> tuple[EmbeddingModel, SquareTransform, PaddedTokenizer]:
    """Load the newest good checkpoint of a stage-2 run.

    Errors: ConfigError when it is no run of stage 2; CheckpointError when it has no good checkpoint.
    """
    if not is_run(run):
        raise ConfigError(f"{run} is not a run directory: an export has no text tower to benchmark")
    config = load_config(run / "config.json")
    if config.objective != "contrast":
        raise ConfigError(f"{run} is a run of stage 1: it has no text tower to benchmark")
    tokenizer = PaddedTokenizer(load_tokenizer(config.data.tokenizer, config.text.vocab_size), config.text.max_tokens)
    model = EmbeddingModel(load_towers(run)).to(device).eval()
    return model, SquareTransform(config.vision.image_size), tokenizer
