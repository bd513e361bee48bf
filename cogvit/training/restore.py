"""Weights of a run or an export as plain modules, for evaluation, export and as the start of another run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from cogvit.config import RunConfig, from_json, load_config
from cogvit.config.recipe import files_of
from cogvit.errors import CheckpointError
from cogvit.model.init import init_tensor
from cogvit.model.interop import load_checked, read_model, read_model_config, read_processing, read_text_side
from cogvit.model.position import resized_table
from cogvit.model.preprocess import Preprocessing
from cogvit.model.pretrained import PretrainedTextTower
from cogvit.model.text import TextTower
from cogvit.model.text_side import TextSide, new_text_tower
from cogvit.model.vit import CogViT
from cogvit.training.checkpoint import folder_of, latest, list_checkpoints, weights
from cogvit.training.folder import Folder
from cogvit.training.identity import identity_of, read_identity

_POSITIONS = "vision.pos_embed.embed"

Tower = TypeVar("Tower", bound=nn.Module)


@dataclass(frozen=True)
class Towers:
    """What a run trained, as plain modules in eval mode; what its stage has not is None or empty."""

    vision: CogViT
    text: TextTower | PretrainedTextTower | None = None
    text_side: TextSide | None = None
    vision_proj: nn.Linear | None = None
    text_proj: nn.Linear | None = None
    heads: dict[str, nn.Linear] = field(default_factory=dict)  # of the teachers


def load_towers(path: Path) -> Towers:
    """Load the newest good checkpoint of a run, or an export or GLM-OCR checkpoint.

    Errors: CheckpointError when there is neither, or the weights do not fit the configuration.
    """
    if not is_run(path):
        cfg, exported = read_model(path)
        vision, found = _filled(CogViT(cfg), exported), read_text_side(path)
        vision.preprocessing = read_processing(path, cfg)
        return Towers(vision) if found is None else _two_towers(vision, from_json(TextSide, found[0]), found[1])
    config, checkpoint = load_config(path / "config.json"), latest_of_run(path)
    vision = _filled(CogViT(config.vision), vision_weights(config, checkpoint))
    vision.preprocessing = preprocessing_of(config)
    text_side = text_side_weights(checkpoint)
    if not text_side:
        return Towers(vision, heads=_heads(weights(checkpoint, "heads.")))
    return _two_towers(vision, TextSide(config.data.tokenizer, config.text, config.text_encoder), text_side)


def vision_weights(config: RunConfig, checkpoint: Folder) -> dict[str, Tensor]:
    """Return a run's vision tower: what it stored, or where that was frozen, what the run began with.

    Errors: CheckpointError when that is not what it was.
    """
    stored = weights(checkpoint, "vision.")
    if stored:
        return stored
    check_source(config, "init")
    given = initial_towers(config) if config.init else drawn("vision", CogViT(config.vision), config)
    return {name.removeprefix("vision."): tensor for name, tensor in given.items() if name.startswith("vision.")}


def drawn(part: str, module: nn.Module, config: RunConfig) -> dict[str, Tensor]:
    """Return the weights that a part has where nothing gives it others, under its plain names."""
    scale = 1.0 if config.vision.layer_scale_init is None else config.vision.layer_scale_init
    named = ((f"{part}.{name}", parameter.shape) for name, parameter in module.named_parameters())
    return {name: init_tensor(name, shape, config.seed, scale) for name, shape in named}


def check_source(config: RunConfig, field: str) -> None:
    """Look whether what a run's frozen part came from is still the same. Errors: CheckpointError."""
    before = read_identity(Folder(config.out)).get(field)
    now = identity_of(config, "", [field]).get(field)
    if before is not None and before != now:
        path = files_of(config)[field]
        raise CheckpointError(
            f"{config.out} has a part that was frozen and lies in --{field.replace('_', '-')} {path}, which is"
            f" {'not there' if now is None else 'another one now'}; put back what the run began with"
        )


def preprocessing_of(config: RunConfig) -> Preprocessing:
    """Return how a run prepares images, which its export repeats; of several budgets the largest."""
    data = config.data
    square = data.sizing == "square"
    rows, columns = config.vision.base_grid
    most = rows * columns if square else data.max_patches
    return Preprocessing(most, square, enlarge=data.enlarge and not square, multiple=data.grid_multiple)


def text_side_weights(checkpoint: Folder) -> dict[str, Tensor]:
    """Return the plain tensors of the text side: the text tower and what compares it with the vision tower, if any."""
    prefixes = ("text.", "text_proj.", "vision_proj.", "log_t", "bias")
    return {prefix + name: tensor for prefix in prefixes for name, tensor in weights(checkpoint, prefix).items()}


def _two_towers(vision: CogViT, side: TextSide, tensors: dict[str, Tensor]) -> Towers:
    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    text = _filled(new_text_tower(side), part("text."))
    return Towers(vision, text, side, _linear(part("vision_proj.")), _linear(part("text_proj.")))


def untrained_towers(path: Path) -> Towers:
    """Return the vision tower of a run or export as it was before any training: the baseline of an evaluation."""
    config = load_config(path / "config.json") if is_run(path) else None
    cfg, seed = (read_model(path)[0], 0) if config is None else (config.vision, config.seed)
    vision = CogViT(cfg)
    scale = 1.0 if cfg.layer_scale_init is None else cfg.layer_scale_init
    fresh = {name: init_tensor(f"vision.{name}", p.shape, seed, scale) for name, p in vision.named_parameters()}
    return Towers(_filled(vision, fresh))


def initial_towers(config: RunConfig) -> dict[str, Tensor]:
    """Return the plain tensors that --init holds: the vision tower's, and of a run all others too.

    A learned position table of another image size is resized as the tower itself resizes it to an image's grid.
    Errors: CheckpointError when the vision tower of --init has another shape than this run's.
    """
    path = Path(config.init)
    if check_init(config) is None:
        given = {f"vision.{name}": tensor for name, tensor in read_model(path)[1].items()}
    else:
        there = load_config(path / "config.json")
        given = weights(checkpoint := latest_of_run(path), "")
        if not any(name.startswith("vision.") for name in given):
            given |= {f"vision.{name}": tensor for name, tensor in vision_weights(there, checkpoint).items()}
    if _POSITIONS in given:
        given[_POSITIONS] = resized_table(given[_POSITIONS], config.vision.base_grid)
    return given


def check_init(config: RunConfig) -> RunConfig | None:
    """Look whether --init holds a vision tower of this run's shape, reading no weights; returns a run's configuration.

    Errors: CheckpointError or ConfigError when it does not.
    """
    path = Path(config.init)
    if not path.is_dir():
        raise CheckpointError(f"--init {path} does not exist; pass a run directory or an export")
    run = load_config(path / "config.json") if is_run(path) else None
    if run is not None and not list_checkpoints(folder_of(path)):
        raise CheckpointError(f"--init {path} has no complete checkpoint in {folder_of(path)}")
    cfg = read_model_config(path) if run is None else run.vision
    blocks = ("norm", "norm_after", "mlp", "position")
    shape = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_dim", "use_cls_token", *blocks)
    differences = [
        f"{name}: {getattr(cfg, name)!r} there, {getattr(config.vision, name)!r} here"
        for name in shape
        if getattr(cfg, name) != getattr(config.vision, name)
    ]
    if differences:
        raise CheckpointError(f"--init {path} is another vision tower ({'; '.join(differences)})")
    return run


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
