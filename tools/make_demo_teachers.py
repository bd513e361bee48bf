"""Writes the two small teachers of the demo: a SigLIP2 and a DINOv3 with random weights that nobody trained.

They are transformers checkpoints like any other, and the same bytes every time. A random network still has structure to
learn: the filters of these are drawn smooth, so that a feature tells strokes rather than pixels, and their attention is
drawn wide enough to spread what an image shows, so that a masked patch is partly told by the patches around it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from einops import rearrange
from torch import Tensor, nn

from cogvit.errors import CogViTError, ConfigError
from cogvit.teacher.zoo import fingerprint, inspect_teacher

SEED = 20260101
_SHAPE = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
_SMALL_STD = 0.02  # of biases
_POSITION_STD = 0.1
_MEAN_COLOR_SHARE = 0.2  # more, and a patch's color outweighs its strokes
_NOTICE = """These teachers are UNTRAINED: random weights, which show that a student learns what its teachers say.
For an encoder worth using pass trained ones, each a directory or a hub name:
  --teachers.members.siglip2.path google/siglip2-so400m-patch16-naflex
  --teachers.members.dinov3.path facebook/dinov3-vitl16-pretrain-lvd1689m"""


def smooth_filters(num_filters: int, side_px: int) -> Tensor:
    """Draw patch filters [F, 3, side, side]: random mixtures of cosines, weaker the faster they swing."""
    frequency = torch.arange(side_px)
    cosines = torch.cos(torch.pi * (torch.arange(side_px)[:, None] + 0.5) * frequency / side_px)  # [pixel, frequency]
    share = 1 / (1.0 + frequency[:, None] + frequency)
    share[0, 0] = _MEAN_COLOR_SHARE
    amplitude = torch.randn(num_filters, 3, side_px, side_px) * share
    filters = torch.einsum("yu,xv,fcuv->fcyx", cosines, cosines, amplitude)
    return filters / filters.flatten(1).norm(dim=1)[:, None, None, None] / side_px


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Draw every matrix at the scale that keeps the variance of its input, and every bias small."""
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight, std=_SMALL_STD)
        elif weight.ndim == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)


@torch.no_grad()
def draw_siglip2() -> transformers.PreTrainedModel:
    """Draw a SigLIP2 vision tower with patches of 8 px."""
    config = transformers.Siglip2VisionConfig(**_SHAPE, patch_size=8, num_patches=64, vision_use_head=False)
    model = transformers.Siglip2VisionModel(config)
    draw_weights(model)
    filters = smooth_filters(config.hidden_size, config.patch_size)
    model.embeddings.patch_embedding.weight.copy_(rearrange(filters, "d c p q -> d (p q c)"))
    nn.init.normal_(model.embeddings.position_embedding.weight, std=_POSITION_STD)
    return model


@torch.no_grad()
def draw_dinov3() -> transformers.PreTrainedModel:
    """Draw a DINOv3 with patches of 4 px and four register tokens."""
    config = transformers.DINOv3ViTConfig(**_SHAPE, patch_size=4, image_size=32, num_register_tokens=4)
    model = transformers.DINOv3ViTModel(config)
    draw_weights(model)
    model.embeddings.patch_embeddings.weight.copy_(smooth_filters(config.hidden_size, config.patch_size))
    return model


def make(out: Path) -> Iterator[Path]:
    """Write out/siglip2 and out/dinov3 and yield their paths; a teacher that is there already is left alone.

    Errors: ConfigError when a path holds anything else.
    """
    out.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(), tempfile.TemporaryDirectory(prefix=".teachers.", dir=out) as scratch:
        torch.manual_seed(SEED)
        for name, model in (("siglip2", draw_siglip2()), ("dinov3", draw_dinov3())):
            fresh, path = Path(scratch) / name, out / name
            model.save_pretrained(fresh)
            if not path.exists():
                fresh.rename(path)
            elif not _same_teacher(path, fresh):
                raise ConfigError(f"{path} holds something else than the demo's teacher; choose another --out")
            yield path


def _same_teacher(path: Path, other: Path) -> bool:
    try:
        return fingerprint(inspect_teacher(str(path))) == fingerprint(inspect_teacher(str(other)))
    except ConfigError:
        return False


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.make_demo_teachers", description=__doc__, epilog=_NOTICE)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the two directories go")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        for path in make(options.out):
            print(path)
    except CogViTError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(_NOTICE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
