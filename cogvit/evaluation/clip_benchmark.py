"""A stage-2 run or its export in the form that LAION's clip_benchmark takes: a model, a transform and a tokenizer.

    from clip_benchmark.metrics import zeroshot_classification
    model, transform, tokenizer = load_for_clip_benchmark("runs/stage2", "cpu")
    zeroshot_classification.evaluate(model, dataloader, tokenizer, classnames, templates, "cpu")

Images are squares of the tower's image size, because the suite stacks them; `python -m cogvit.evaluate` takes any
shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cogvit.errors import ConfigError, DataError
from cogvit.model.images import upright_pixels
from cogvit.model.naflex import resize_to_grid
from cogvit.model.tokenizer import Tokenizer, load_tokenizer
from cogvit.training.restore import Towers, load_towers

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
    """A Pillow image to [3, side, side] in [-1, 1], decoded as in training: upright, on white, 8 bits."""

    side_px: int

    def __call__(self, image: Image.Image) -> Tensor:
        """Resize one image, bilinear and antialiased, whatever its shape."""
        pixels = rearrange(torch.from_numpy(upright_pixels(image)), "h w c -> c h w")
        return resize_to_grid(pixels, (self.side_px, self.side_px), patch_size=1) / 127.5 - 1.0


@dataclass(frozen=True)
class PaddedTokenizer:
    """Texts to rows of ids of one length."""

    tokenizer: Tokenizer
    max_tokens: int

    def __call__(self, texts: str | list[str]) -> Tensor:
        """Return [B, L] int64, one row for one text; longer texts lose their end. Errors: DataError for no text."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise DataError("there are no texts to tokenize; pass at least one")
        ids = [torch.from_numpy(self.tokenizer.encode(text, self.max_tokens).ids) for text in texts]
        return pad_sequence(ids, batch_first=True, padding_value=_NO_TOKEN)


def load_for_clip_benchmark(
    run_or_export: str | Path, device: str
) -> tuple[EmbeddingModel, SquareTransform, PaddedTokenizer]:
    """Load the newest good checkpoint of a stage-2 run, or what `tools.export --layout two_towers` wrote of one.

    Errors: ConfigError when there is no text tower; CheckpointError when there is no good checkpoint.
    """
    towers = load_towers(Path(run_or_export))
    side = towers.text_side
    if side is None:
        raise ConfigError(
            f"{run_or_export} has no text tower to benchmark; pass a run of stage 2, or its export with --layout"
            " two_towers"
        )
    tokenizer = PaddedTokenizer(load_tokenizer(side.tokenizer, side.text.vocab_size), side.text.max_tokens)
    return EmbeddingModel(towers).to(device).eval(), SquareTransform(towers.vision.cfg.image_size), tokenizer
