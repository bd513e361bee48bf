"""Weights of a run or an export as plain modules, for evaluation, export and as the start of another run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from cogvit.config import RunConfig, load_config
from cogvit.errors import CheckpointError
from cogvit.model.init import init_tensor
from cogvit.model.interop import load_checked, read_model
from cogvit.model.position import resized_table
from cogvit.model.pretrained import PretrainedTextTower, new_text_encoder
from cogvit.model.text import TextTower
from cogvit.model.vit import CogViT
from cogvit.training.checkpoint import folder_of, latest, weights
from cogvit.training.folder import Folder
from data_pipeline.caption import load_tokenizer

_POSITIONS = "vision.pos_embed.embed"

Tower = TypeVar("Tower", bound=nn.Module)


@dataclass(frozen=True)
class Towers:
    """What a run trained, as plain modules in eval mode; what its stage has not is None or empty."""

    vision: CogViT
    text: TextTower | PretrainedTextTower | None
    vision_proj: nn.Linear | None
    text_proj: nn.Linear | None
    heads: dict[str, nn.Linear]  # of the teachers


def load_towers(path: Path) -> Towers:
    """Load the newest good checkpoint of a run, or an export or GLM-OCR checkpoint (vision tower only).

    Errors: CheckpointError when there is neither, or the weights do not fit the configuration.
    """
    if not is_run(path):
        cfg, exported = read_model(path)
        return Towers(_filled(CogViT(cfg), exported), None, None, None, {})
    config, checkpoint = load_config(path / "config.json"), latest_of_run(path)
    vision = _filled(CogViT(config.vision), weights(checkpoint, "vision."))
    if config.objective == "distill":
        return Towers(vision, None, None, None, _heads(weights(checkpoint, "heads.")))
    text = _filled(_text_tower(config), weights(checkpoint, "text."))
    projections = [_linear(weights(checkpoint, f"{name}.")) for name in ("vision_proj", "text_proj")]
    return Towers(vision, text, projections[0], projections[1], {})


def untrained_towers(path: Path) -> Towers:
    """Return the vision tower of a run or export as it was before any training: the baseline of an evaluation."""
    config = load_config(path / "config.json") if is_run(path) else None
    cfg, seed = (read_model(path)[0], 0) if config is None else (config.vision, config.seed)
    vision = CogViT(cfg)
    scale = 1.0 if cfg.layer_scale_init is None else cfg.layer_scale_init
    fresh = {name: init_tensor(f"vision.{name}", p.shape, seed, scale) for name, p in vision.named_parameters()}
    return Towers(_filled(vision, fresh), None, None, None, {})


def initial_towers(config: RunConfig) -> dict[str, Tensor]:
    """Return the plain tensors that a run takes from its --init: the vision tower, and the text side where it has one.

    A learned position table of another image size is resized as the tower itself resizes it to an image's grid.
    Errors: CheckpointError when the vision tower of --init has another shape than this run's.
    """
    path = Path(config.init)
    if not is_run(path):
        cfg, vision = read_model(path)
        given = {f"vision.{name}": tensor for name, tensor in vision.items()}
    else:
        cfg = load_config(path / "config.json").vision
        given = {key: tensor for key, tensor in weights(latest_of_run(path), "").items() if _is_tower(key, config)}
    shape = ["patch_size", "embed_dim", "depth", "num_heads", "mlp_dim", "norm", "mlp", "position", "use_cls_token"]
    differences = [
        f"{name}: {getattr(cfg, name)!r} there, {getattr(config.vision, name)!r} here"
        for name in shape
        if getattr(cfg, name) != getattr(config.vision, name)
    ]
    if differences:
        raise CheckpointError(f"--init {path} is another vision tower ({'; '.join(differences)})")
    if _POSITIONS in given:
        given[_POSITIONS] = resized_table(given[_POSITIONS], config.vision.base_grid)
    return given


def is_run(path: Path) -> bool:
    """Whether a path is a run directory (and not an export)."""
    return (path / "checkpoints").is_dir() or (path / "metrics.jsonl").is_file()


def latest_of_run(path: Path) -> Folder:
    """Return the newest good checkpoint of a run. Errors: CheckpointError when there is none."""
    folder = folder_of(path)
    checkpoint = latest(folder)
    if checkpoint is None:
        raise CheckpointError(f"{path} has no complete checkpoint in {folder}")
    return checkpoint


def _is_tower(key: str, config: RunConfig) -> bool:
    if config.objective == "distill":
        return key.startswith("vision.")
    return not key.startswith("heads.")


def _text_tower(config: RunConfig) -> TextTower | PretrainedTextTower:
    """Return the run's text tower; one of transformers is built from the configuration beside its own checkpoint."""
    if not config.text_encoder.path:
        return TextTower(config.text)
    pad_id = load_tokenizer(config.data.tokenizer, config.text.vocab_size).pad_id
    return new_text_encoder(config.text_encoder, pad_id)


def _filled(module: Tower, tensors: dict[str, Tensor]) -> Tower:
    load_checked(module, tensors)
    return module.eval()


def _linear(tensors: dict[str, Tensor]) -> nn.Linear:
    rows, columns = tensors["weight"].shape
    return _filled(nn.Linear(columns, rows), tensors)


def _heads(tensors: dict[str, Tensor]) -> dict[str, nn.Linear]:
    names = sorted({key.split(".")[0] for key in tensors})
    return {
        name: _linear({key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")})
        for name in names
    }
