"""Frozen teachers: SigLIP2 (NaFlex and fixed size), SigLIP and DINOv3 from transformers checkpoints, or your own.

A teacher sees the image at (grid of the student) x (its own patch size), so that both grids match and nothing is
interpolated; one that knows a single grid sees its own square and its features are resampled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from einops import rearrange
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cogvit.config import SUMMARY
from cogvit.errors import ConfigError
from cogvit.model.mim import TeacherWrapper
from cogvit.model.pretrained import quiet, resolve, weight_files
from cogvit.teacher.own import is_own, make_wrapper, wrapper_digest

Grid = tuple[int, int]  # rows, columns, in patches
Pixels = NDArray[np.uint8]  # [H, W, 3]
# (model, [3, H, W] images, grids, whether a summary is wanted) -> [rows, C] of each image, its summary first.
Forward = Callable[[nn.Module, list[Tensor], Sequence[Grid], bool], list[Tensor]]
Family = Literal["siglip2", "siglip", "dinov3", "own"]

_FAMILY_OF_MODEL_TYPE: dict[str, Family] = {
    "siglip2": "siglip2",
    "siglip2_vision_model": "siglip2",
    "siglip": "siglip",  # the fixed-size SigLIP2 checkpoints too
    "siglip_vision_model": "siglip",
    "dinov3_vit": "dinov3",
}
CPU = torch.device("cpu")
_HALF = (0.5, 0.5, 0.5)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TeacherSpec:
    """What a teacher is; a checkpoint says it without its weights."""

    location: str  # directory of the checkpoint, or package.module:function
    family: Family
    dim: int  # C
    patch_size_px: int
    fixed_grid: Grid | None  # None: any grid
    image_mean: tuple[float, ...]  # of channels in [0, 1]
    image_std: tuple[float, ...]
    layer: int = -1  # whose output is taken, through the last norm; -1 is the last


@dataclass(frozen=True)
class Teacher:
    """A frozen vision tower whose patch features are regressed, and its summary of an image where `parts` says so.

    `features` of the same images, grids and order are the same bits on the same machine and number of threads.
    """

    spec: TeacherSpec
    model: nn.Module
    forward: Forward
    dtype: torch.dtype  # of the features
    parts: tuple[str, ...] = ("",)  # "" for patches, SUMMARY
    device: torch.device = CPU  # of the model and of features; images are on the CPU

    @property
    def dim(self) -> int:
        """C, channels of a feature."""
        return self.spec.dim

    def input_px(self, grid: Grid) -> tuple[int, int]:
        """Return the (height, width) at which this teacher wants an image of a student's grid."""
        rows, columns = self.spec.fixed_grid or grid
        return rows * self.spec.patch_size_px, columns * self.spec.patch_size_px

    @torch.inference_mode()
    def features(self, images: Sequence[Pixels], grids: Sequence[Grid]) -> list[Tensor]:
        """Return the features of images of `input_px` size (uint8 [H, W, 3]) as one forward batch.

        Each is [rows * columns, C], in the row-major order of its grid and in the precision of the teacher, behind one
        row of summary where `parts` has one.
        """
        if not images:
            return []
        features = self.forward(self.model, self._normalized(images), grids, SUMMARY in self.parts)
        return [feature.to(self.dtype) for feature in features]

    def _normalized(self, images: Sequence[Pixels]) -> list[Tensor]:
        """Return float32 [3, H, W] of each; all go to the device at once."""
        means = (self.spec.image_mean, self.spec.image_std)
        mean, std = (torch.tensor(values, device=self.device)[:, None, None] for values in means)
        flat = torch.cat([torch.tensor(image).view(-1) for image in images]).to(self.device)
        parts = zip(flat.split([image.size for image in images]), images, strict=True)
        return [(rearrange(part.view(image.shape), "h w c -> c h w") / 255 - mean) / std for part, image in parts]


def inspect_teacher(path: str, layer: int = -1) -> TeacherSpec:
    """Read what a checkpoint (local directory or hub name) is, or make a teacher of the user's own and ask it.

    Errors: ConfigError when it is none that we know.
    """
    if is_own(path):
        _require(layer == -1, f"teacher {path} gives one layer; leave its layer at -1")
        return _own_spec(path, make_wrapper(path))
    directory = resolve(path, "teacher")
    try:
        model_type = json.loads((directory / "config.json").read_text())["model_type"]
    except FileNotFoundError:
        raise ConfigError(f"teacher {path} is not a transformers checkpoint: it has no config.json") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"teacher {path} is not a transformers checkpoint: config.json has no model_type") from None
    if model_type not in _FAMILY_OF_MODEL_TYPE:
        raise ConfigError(
            f"teacher {path} is a {model_type!r}; known model types are {', '.join(_FAMILY_OF_MODEL_TYPE)}"
        )
    weight_files(directory, "teacher")
    family = _FAMILY_OF_MODEL_TYPE[model_type]
    config = _read_config(directory, family)
    if not isinstance(config.patch_size, int) or config.num_channels != 3:
        raise ConfigError(f"teacher {path} has no square patches of three channels, which is all that is supported")
    depth = config.num_hidden_layers
    _require(-depth <= layer <= -1, f"teacher {path} has {depth} blocks; its layer={layer} must be -{depth} to -1")
    side_patches = config.image_size // config.patch_size if family == "siglip" else 0
    mean, std = (_IMAGENET_MEAN, _IMAGENET_STD) if family == "dinov3" else (_HALF, _HALF)
    stated = _preprocessing(directory)
    return TeacherSpec(
        location=str(directory),
        family=family,
        dim=config.hidden_size,
        patch_size_px=config.patch_size,
        fixed_grid=(side_patches, side_patches) if family == "siglip" else None,
        image_mean=tuple(stated.get("image_mean", mean)),
        image_std=tuple(stated.get("image_std", std)),
        layer=layer,
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def load_teacher(
    path: str,
    precision: Literal["fp32", "bf16"],
    *,
    layer: int = -1,
    parts: tuple[str, ...] = ("",),
    compiled: bool = False,
    device: torch.device = CPU,
) -> Teacher:
    """Load a teacher, frozen and in eval mode; a checkpoint from safetensors and without remote code.

    Errors: ConfigError when the directory is not a complete checkpoint of a known model.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    spec, model, forward = _own(path, dtype) if is_own(path) else _pretrained(path, layer, dtype, SUMMARY in parts)
    model = model.to(device)
    if compiled:
        model.compile(dynamic=True)
    return Teacher(spec, model, forward, dtype, parts, device)


def _pretrained(path: str, layer: int, dtype: torch.dtype, summary: bool) -> tuple[TeacherSpec, nn.Module, Forward]:
    spec = inspect_teacher(path, layer)
    model_class, forward = {
        "siglip2": (transformers.Siglip2VisionModel, _siglip2_features),
        "siglip": (transformers.SiglipVisionModel, _siglip_features),
        "dinov3": (transformers.DINOv3ViTModel, _dinov3_features),
    }[spec.family]
    return spec, _load(model_class, spec, dtype, summary), forward


def fingerprint(spec: TeacherSpec) -> str:
    """Return a hash of everything that decides the features: weights, configuration, preprocessing, layer."""
    if spec.family == "own":
        return wrapper_digest(spec.location)
    output = "last_hidden_state" if spec.layer == -1 else f"layer {spec.layer}"
    digest = hashlib.sha256(f"{output} {spec.image_mean} {spec.image_std}".encode())
    directory = Path(spec.location)
    for path in [directory / "config.json", *weight_files(directory, "teacher")]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _siglip2_features(model: nn.Module, pixels: list[Tensor], grids: Sequence[Grid], summary: bool) -> list[Tensor]:
    """NaFlex: images of any grid, padded to the longest of the batch."""
    patches = [_patchify(image, grid) for image, grid in zip(pixels, grids, strict=True)]
    lengths = [len(patch) for patch in patches]
    output = model(
        pixel_values=pad_sequence(patches, batch_first=True),
        pixel_attention_mask=pad_sequence([patch.new_ones(len(patch), dtype=torch.int64) for patch in patches], True),
        spatial_shapes=torch.tensor(grids),
    )
    features = [feature[:length] for feature, length in zip(output.last_hidden_state, lengths, strict=True)]
    return _behind(output.pooler_output, features) if summary else features


def _behind(summary_BC: Tensor, features: list[Tensor]) -> list[Tensor]:
    """Put each image's patch features behind its summary."""
    return [torch.cat([first_C[None], feature]) for first_C, feature in zip(summary_BC, features, strict=True)]


def _patchify(image: Tensor, grid: Grid) -> Tensor:
    """Cut [3, H, W] into [rows * columns, P * P * 3]; SigLIP2 keeps channels last inside a patch."""
    rows, columns = grid
    return rearrange(image, "c (rows p) (columns q) -> (rows columns) (p q c)", rows=rows, columns=columns)


def _siglip_features(model: nn.Module, pixels: list[Tensor], grids: Sequence[Grid], summary: bool) -> list[Tensor]:
    """One fixed square; features are resampled to grids that differ from the teacher's."""
    output = model(pixel_values=torch.stack(pixels))
    side = int(output.last_hidden_state.shape[1] ** 0.5)
    features = [
        feature if grid == (side, side) else _resample(feature, (side, side), grid)
        for feature, grid in zip(output.last_hidden_state, grids, strict=True)
    ]
    return _behind(output.pooler_output, features) if summary else features


def _resample(feature: Tensor, source: Grid, target: Grid) -> Tensor:
    field = rearrange(feature, "(rows columns) c -> 1 c rows columns", rows=source[0]).float()
    resampled = F.interpolate(field, target, mode="bilinear", antialias=True)
    return rearrange(resampled, "1 c rows columns -> (rows columns) c").to(feature.dtype)


def _dinov3_features(model: nn.Module, pixels: list[Tensor], grids: Sequence[Grid], summary: bool) -> list[Tensor]:
    """Rotary positions take any grid; register tokens are dropped, and the class token is the summary."""

    def forward(images: Tensor, grid: Grid) -> Tensor:
        tokens = model(pixel_values=images).last_hidden_state
        patches = tokens[:, -grid[0] * grid[1] :]
        return torch.cat([tokens[:, :1], patches], dim=1) if summary else patches

    return _by_grid(forward, pixels, grids)


def _own(path: str, dtype: torch.dtype) -> tuple[TeacherSpec, nn.Module, Forward]:
    """Make a teacher of the user's own: its summary is the mean of its patches; autocast makes it bf16.

    Errors of its forward: ConfigError when the module does not give [B, N, C] on its grid.
    """
    wrapper = make_wrapper(path)

    def features(model: nn.Module, pixels: list[Tensor], grids: Sequence[Grid], summary: bool) -> list[Tensor]:
        try:
            with torch.autocast(pixels[0].device.type, dtype, enabled=dtype == torch.bfloat16):
                found = _by_grid(model, pixels, grids)
        except ValueError as error:
            raise ConfigError(f"teacher {path}: {error}") from error
        return _behind(torch.stack([feature.float().mean(dim=0) for feature in found]), found) if summary else found

    return _own_spec(path, wrapper), wrapper, features


def _own_spec(path: str, wrapper: TeacherWrapper) -> TeacherSpec:
    return TeacherSpec(path, "own", wrapper.feature_dim, wrapper.patch_size, wrapper.out_grid, _HALF, _HALF)


def _by_grid(forward: Callable[[Tensor, Grid], Tensor], pixels: list[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
    """Run images of one grid as one batch, [B, 3, H, W] to [B, rows, C]."""
    found: dict[int, Tensor] = {}
    for grid in dict.fromkeys(grids):
        members = [index for index, other in enumerate(grids) if other == grid]
        found.update(zip(members, forward(torch.stack([pixels[index] for index in members]), grid), strict=True))
    return [found[index] for index in range(len(pixels))]


def _read_config(directory: Path, family: Family) -> transformers.PreTrainedConfig:
    """Return the configuration of the vision tower."""
    config_class = {
        "siglip2": transformers.Siglip2VisionConfig,
        "siglip": transformers.SiglipVisionConfig,
        "dinov3": transformers.DINOv3ViTConfig,
    }[family]
    with quiet():
        return config_class.from_pretrained(directory)


def _load(
    model_class: type[transformers.PreTrainedModel], spec: TeacherSpec, dtype: torch.dtype, summary: bool
) -> nn.Module:
    """Load the blocks up to the layer that is wanted; SigLIP's pooling head only where a summary is."""
    config = _read_config(Path(spec.location), spec.family)
    config.num_hidden_layers += spec.layer + 1
    if spec.family != "dinov3":
        config.vision_use_head = summary
    with quiet():
        try:
            model, report = model_class.from_pretrained(
                spec.location, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"teacher {spec.location} does not load: {reason}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ConfigError(
            f"teacher {spec.location} lacks {len(missing)} weights of a {model_class.__name__}, {missing[0]} first"
        )
    return model.eval().requires_grad_(False)


def _preprocessing(directory: Path) -> dict[str, list[float]]:
    path = directory / "preprocessor_config.json"
    return json.loads(path.read_text()) if path.exists() else {}
