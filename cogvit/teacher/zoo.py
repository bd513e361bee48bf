"""Frozen teachers: SigLIP2 (NaFlex and fixed size), SigLIP and DINOv3 from transformers checkpoints, or your own.

A teacher sees the image at (grid of the student) x (its own patch size), so that both grids match and nothing is
interpolated; one that knows a single grid sees its own square and its features are resampled. This is the only module
of the package that imports transformers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cogvit.errors import ConfigError
from cogvit.model.mim import TeacherWrapper
from cogvit.teacher.own import is_own, make_wrapper, wrapper_digest

Grid = tuple[int, int]  # rows, columns, in patches
Pixels = NDArray[np.uint8]  # [H, W, 3]
Family = Literal["siglip2", "siglip", "dinov3", "own"]

_FAMILY_OF_MODEL_TYPE: dict[str, Family] = {
    "siglip2": "siglip2",
    "siglip2_vision_model": "siglip2",
    "siglip": "siglip",  # the fixed-size SigLIP2 checkpoints too
    "siglip_vision_model": "siglip",
    "dinov3_vit": "dinov3",
}
_HALF = (0.5, 0.5, 0.5)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CHECKPOINT_FILES = ["*.json", "*.safetensors"]


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


@dataclass(frozen=True)
class Teacher:
    """A frozen vision tower whose patch features are regressed.

    `features` of the same images, grids and order are the same bits on the same machine and number of threads.
    """

    spec: TeacherSpec
    model: nn.Module
    forward: Callable[[nn.Module, list[Tensor], Sequence[Grid]], list[Tensor]]
    dtype: torch.dtype  # of the features

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
        """Return the last layer's patch features of images of `input_px` size (uint8 [H, W, 3]) as one forward batch.

        Each is [rows * columns, C] in the row-major order of its grid and in the precision of the teacher.
        """
        if not images:
            return []
        features = self.forward(self.model, [self._normalize(image) for image in images], grids)
        return [feature.to(self.dtype) for feature in features]

    def _normalize(self, image: Pixels) -> Tensor:
        """Return float32 [3, H, W]."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.spec.image_mean, self.spec.image_std))
        return (torch.tensor(image).permute(2, 0, 1) / 255 - mean) / std


def inspect_teacher(path: str) -> TeacherSpec:
    """Read what a checkpoint (local directory or hub name) is, or make a teacher of the user's own and ask it.

    Errors: ConfigError when it is none that we know.
    """
    if is_own(path):
        return _own_spec(path, make_wrapper(path))
    directory = _resolve(path)
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
    weight_files(directory)
    family = _FAMILY_OF_MODEL_TYPE[model_type]
    config = _read_config(directory, family)
    if not isinstance(config.patch_size, int) or config.num_channels != 3:
        raise ConfigError(f"teacher {path} has no square patches of three channels, which is all that is supported")
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
    )


def load_teacher(path: str, precision: Literal["fp32", "bf16"]) -> Teacher:
    """Load a teacher, frozen and in eval mode; a checkpoint from safetensors and without remote code.

    Errors: ConfigError when the directory is not a complete checkpoint of a known model.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if is_own(path):
        wrapper = make_wrapper(path)
        return Teacher(_own_spec(path, wrapper), wrapper, _own_forward(path, dtype), dtype)
    spec = inspect_teacher(path)
    match spec.family:
        case "siglip2":
            return Teacher(spec, _load(transformers.Siglip2VisionModel, spec, dtype), _siglip2_features, dtype)
        case "siglip":
            return Teacher(spec, _load(transformers.SiglipVisionModel, spec, dtype), _siglip_features, dtype)
        case "dinov3":
            return Teacher(spec, _load(transformers.DINOv3ViTModel, spec, dtype), _dinov3_features, dtype)


def fingerprint(spec: TeacherSpec) -> str:
    """Return a hash of everything that decides the features: weights, configuration, preprocessing, layer."""
    if spec.family == "own":
        return wrapper_digest(spec.location)
    digest = hashlib.sha256(f"last_hidden_state {spec.image_mean} {spec.image_std}".encode())
    directory = Path(spec.location)
    for path in [directory / "config.json", *weight_files(directory)]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def weight_files(directory: Path) -> list[Path]:
    """Return the weights of a checkpoint. Errors: ConfigError when there are none in safetensors."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"teacher {directory} has no *.safetensors; other formats can run code and are refused")
    return files


def _siglip2_features(model: nn.Module, pixels: list[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
    """NaFlex: images of any grid, padded to the longest of the batch."""
    patches = [_patchify(image, grid) for image, grid in zip(pixels, grids, strict=True)]
    lengths = [len(patch) for patch in patches]
    output = model(
        pixel_values=pad_sequence(patches, batch_first=True),
        pixel_attention_mask=pad_sequence([torch.ones(length, dtype=torch.int64) for length in lengths], True),
        spatial_shapes=torch.tensor(grids),
    ).last_hidden_state
    return [feature[:length] for feature, length in zip(output, lengths, strict=True)]


def _patchify(image: Tensor, grid: Grid) -> Tensor:
    """Cut [3, H, W] into [rows * columns, P * P * 3]; SigLIP2 keeps channels last inside a patch."""
    rows, columns = grid
    return image.unflatten(1, (rows, -1)).unflatten(3, (columns, -1)).permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)


def _siglip_features(model: nn.Module, pixels: list[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
    """One fixed square; features are resampled to grids that differ from the teacher's."""
    output = model(pixel_values=torch.stack(pixels)).last_hidden_state
    side = int(output.shape[1] ** 0.5)
    return [
        feature if grid == (side, side) else _resample(feature, (side, side), grid)
        for feature, grid in zip(output, grids, strict=True)
    ]


def _resample(feature: Tensor, source: Grid, target: Grid) -> Tensor:
    field = feature.T.unflatten(1, source)[None].float()
    resampled = F.interpolate(field, target, mode="bilinear", antialias=True)
    return resampled[0].flatten(1).T.to(feature.dtype)


def _dinov3_features(model: nn.Module, pixels: list[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
    """Rotary positions take any grid; class and register tokens are dropped."""

    def forward(images: Tensor, grid: Grid) -> Tensor:
        return model(pixel_values=images).last_hidden_state[:, -grid[0] * grid[1] :]

    return _by_grid(forward, pixels, grids)


def _own_forward(path: str, dtype: torch.dtype) -> Callable[[nn.Module, list[Tensor], Sequence[Grid]], list[Tensor]]:
    """Return the forward of a TeacherWrapper, under autocast where its features are wanted in bf16.

    Errors of what is returned: ConfigError when the module does not give [B, N, C] on its grid.
    """

    def features(model: nn.Module, pixels: list[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        try:
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                return _by_grid(model, pixels, grids)
        except ValueError as error:
            raise ConfigError(f"teacher {path}: {error}") from error

    return features


def _own_spec(path: str, wrapper: TeacherWrapper) -> TeacherSpec:
    return TeacherSpec(path, "own", wrapper.feature_dim, wrapper.patch_size, wrapper.out_grid, _HALF, _HALF)


def _by_grid(forward: Callable[[Tensor, Grid], Tensor], pixels: list[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
    """Run images of one grid as one batch, [B, 3, H, W] to [B, rows * columns, C]."""
    found: dict[int, Tensor] = {}
    for grid in dict.fromkeys(grids):
        members = [index for index, other in enumerate(grids) if other == grid]
        found.update(zip(members, forward(torch.stack([pixels[index] for index in members]), grid), strict=True))
    return [found[index] for index in range(len(pixels))]


def _read_config(directory: Path, family: Family) -> transformers.PreTrainedConfig:
    """Return the configuration of the vision tower, without the pooling head that we never read."""
    config_class = {
        "siglip2": transformers.Siglip2VisionConfig,
        "siglip": transformers.SiglipVisionConfig,
        "dinov3": transformers.DINOv3ViTConfig,
    }[family]
    with _quiet():
        config = config_class.from_pretrained(directory)
    if family != "dinov3":
        config.vision_use_head = False
    return config


def _load(model_class: type[transformers.PreTrainedModel], spec: TeacherSpec, dtype: torch.dtype) -> nn.Module:
    config = _read_config(Path(spec.location), spec.family)
    with _quiet():
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


def _resolve(path: str) -> Path:
    """Return the directory of a checkpoint, downloading it when it is a hub name."""
    if path and Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ConfigError(f"teacher {path!r} does not exist; pass a checkpoint directory or a hub name")
    from huggingface_hub import snapshot_download  # a network client that local runs need not load

    try:
        return Path(snapshot_download(path, allow_patterns=_CHECKPOINT_FILES))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"teacher {path} is no directory here, and the hub did not give it: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep load reports and progress bars of transformers off the terminal; we check the reports ourselves."""
    log = transformers.utils.logging
    verbosity, progress = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if progress:
            log.enable_progress_bar()
