"""Writes the encoder of a run, or a whole vision-language model, for others to load.

usage: python -m tools.export RUN --out DIR [flags]

--out DIR      new directory for the export
--layout NAME  what it is for (default: cogvit)
               cogvit        CogViT.from_pretrained(DIR), and AutoModel.from_pretrained(DIR, trust_remote_code=True)
               two_towers    that, and the text side of a stage-2 run: CogViTForContrastive.from_pretrained(DIR),
                             python -m cogvit.evaluate DIR and load_for_clip_benchmark(DIR, device)
               glm_ocr       GlmOcrVisionModel.from_pretrained(DIR) of transformers
               glm5_next     Glm5NextVisionModel.from_pretrained(DIR) of transformers
               vlm           VisionLanguageModel.from_pretrained(DIR) and python -m cogvit.generate DIR: a run of stage
                             3; DIR/language loads in transformers alone
               glm_ocr_full  GlmOcrForConditionalGeneration.from_pretrained(DIR) of transformers with its processor,
                             and those of vlm: a run of stage 3 with a GLM-4 and --adapter.kind glm
               onnx          model.onnx for images of one size, in any number
               torch_export  model.pt2, the same for torch.export.load
               cogvlm        the directory that was released as CogVLM; RUN is then one of these, whose code files and
               cogvlm2       tokenizer are copied, an export that VisionLanguageModel.from_pretrained reads, or a run
               cogagent      of stage 3 with --expert.every 1 and an encoder like EVA2-CLIP-E; cogagent has a cross
                             module (--cross.image-size)
               glm4v_9b      the directory of GLM-4V-9B; RUN is then such a one
--size HxW     onnx and torch_export: the images' height and width in px, multiples of the patch (default: the square
               that the encoder was trained with)

Every export holds a preprocessor_config.json that says how training prepared images. glm_ocr and glm5_next take
encoders of the cogvit_l family (2-D rotary positions, RMSNorm, SwiGLU, no CLS) and leave the merger to the receiver.
The newest good checkpoint is taken. Teacher heads stay behind, and so does the text side unless it is asked for.
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from cogvit.config.arguments import run_command
from cogvit.errors import ConfigError
from cogvit.model.adapter import save_glm_ocr
from cogvit.model.fixed import write_program
from cogvit.model.interop import write_text_side
from cogvit.model.layouts import released
from cogvit.model.packing import Grid
from cogvit.model.pretrained import has_tokenizer
from cogvit.model.vit import CogViT
from cogvit.model.vlm import VisionLanguageModel
from cogvit.training.joint import load_joint
from cogvit.training.restore import is_run, latest_of_run, load_towers, text_side_weights

LAYOUTS: dict[str, str] = {  # and who loads them
    "cogvit": "CogViT.from_pretrained",
    "two_towers": "CogViTForContrastive.from_pretrained",
    "glm_ocr": "GlmOcrVisionModel.from_pretrained",
    "glm5_next": "Glm5NextVisionModel.from_pretrained",
    "vlm": "VisionLanguageModel.from_pretrained",
    "glm_ocr_full": "GlmOcrForConditionalGeneration.from_pretrained",
    "onnx": "onnxruntime.InferenceSession",
    "torch_export": "torch.export.load",
    **{name: "VisionLanguageModel.from_pretrained" for name in released.LAYOUTS},
}
_BESIDE = ("*.py", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "LICENSE*", "MODEL_LICENSE*")  # of a release


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    run: str
    out: str = ""
    layout: str = "cogvit"
    size: str = ""


def export(arguments: Arguments) -> int:
    """Write the export; returns the exit status."""
    run, out, layout = Path(arguments.run), Path(arguments.out), arguments.layout
    if not arguments.out:
        raise ConfigError("--out DIR is needed: a new directory for the export")
    if layout not in LAYOUTS:
        raise ConfigError(f"--layout {layout!r} is unknown; expected one of {', '.join(LAYOUTS)}")
    if arguments.size and layout not in ("onnx", "torch_export"):
        raise ConfigError(f"--size is of --layout onnx and torch_export; {layout} takes images of any size")
    if layout in released.LAYOUTS:
        return export_released(run, _new_directory(out), layout)
    if not is_run(run):
        raise ConfigError(f"{run} is not a run directory: it has no checkpoints")
    _new_directory(out)
    if layout in ("vlm", "glm_ocr_full"):
        return export_joint(run, out, layout)
    checkpoint, towers = latest_of_run(run), load_towers(run)
    vision, side = towers.vision, towers.text_side
    if layout == "two_towers" and side is None:
        raise ConfigError(f"{run} is of stage 1 and has no text tower; leave --layout two_towers out")
    written = out
    try:
        match layout:
            case "glm_ocr" | "glm5_next":
                save_glm_ocr(out, vision, family=layout)
            case "onnx":
                written = write_program(out, vision, fixed_grid(vision, arguments.size), "onnx")
            case "torch_export":
                written = write_program(out, vision, fixed_grid(vision, arguments.size), "pt2")
            case _:
                vision.save_pretrained(out)
        if layout == "two_towers" and side is not None:
            write_text_side(out, side.to_json(), text_side_weights(checkpoint))
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None
    num_parameters = sum(parameter.numel() for parameter in vision.parameters())
    print(f"{checkpoint} -> {out}: {num_parameters:,} parameters; load them with {LAYOUTS[layout]}({str(written)!r})")
    if layout in ("glm_ocr", "glm5_next"):
        print(
            "the receiver initializes and trains its merger (downsample.*, merger.*), which an encoder has not; the"
            " mask token stays behind"
        )
    return 0


def export_released(source: Path, out: Path, layout: released.Layout) -> int:
    """Write a vision-language model as it was released, with the files that lie beside its weights; returns 0.

    Errors: CheckpointError when the source is none or the layout does not hold it.
    """
    model = load_joint(source) if is_run(source) else VisionLanguageModel.from_pretrained(source)
    if has_tokenizer(source):  # it is copied as it is
        model.tokenizer = None
    try:
        model.save_pretrained(out, layout=layout)
        for path in () if is_run(source) else (path for pattern in _BESIDE for path in source.glob(pattern)):
            if not (out / path.name).exists() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, out / path.name)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{source} -> {out}: {num_parameters:,} parameters; load them with {LAYOUTS[layout]}({str(out)!r})")
    if is_run(source):
        print(
            f"there it is asked in the words of {layout}, and not by the chat template that it was trained with, which"
            " --layout vlm keeps"
        )
    return 0


def _new_directory(out: Path) -> Path:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists; choose a new directory")
    return out


def export_joint(run: Path, out: Path, layout: str) -> int:
    """Write encoder, adapter and language model; returns the exit status."""
    checkpoint, model = latest_of_run(run), load_joint(run)
    try:
        if layout == "vlm":
            model.save_pretrained(out)
        else:
            model.save_glm_ocr_full(out)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{checkpoint} -> {out}: {num_parameters:,} parameters; load them with {LAYOUTS[layout]}({str(out)!r})")
    return 0


def fixed_grid(vision: CogViT, size: str) -> Grid:
    """Return the grid of patches for a size in px as --size says it. Errors: ConfigError."""
    cfg = vision.cfg
    if not size:
        return cfg.base_grid
    found = re.fullmatch(r"([0-9]+)x([0-9]+)", size)
    sides = [int(side) for side in found.groups()] if found else []
    if not sides or min(sides) < 1 or any(side % cfg.patch_size for side in sides):
        raise ConfigError(f"--size {size} must be HxW, both multiples of the patch of {cfg.patch_size} px")
    return sides[0] // cfg.patch_size, sides[1] // cfg.patch_size


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], __doc__, Arguments, export))
