"""Writes the vision encoder of a run for others to load.

usage: python -m tools.export RUN --out DIR [--layout cogvit|two_towers|glm_ocr]

--out DIR     new directory; it gets config.json and model.safetensors, which CogViT.from_pretrained(DIR) reads
--layout NAME two_towers adds the text tower, both projections, temperature and bias of a stage-2 run in DIR/text_side,
              for python -m cogvit.evaluate DIR and load_for_clip_benchmark(DIR, device); glm_ocr is for
              GlmOcrVisionModel.from_pretrained(DIR) of transformers, without its merger, encoders of the cogvit_l
              family only (default: cogvit)

The newest good checkpoint is taken. Teacher heads stay behind, and so does the text side unless it is asked for.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from cogvit.config.arguments import run_command
from cogvit.errors import ConfigError
from cogvit.model.adapter import save_glm_ocr
from cogvit.model.interop import write_text_side
from cogvit.training.restore import is_run, latest_of_run, load_towers, text_side_weights

LOADERS = {"cogvit": "CogViT", "two_towers": "CogViT", "glm_ocr": "GlmOcrVisionModel"}


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    run: str
    out: str = ""
    layout: str = "cogvit"


def export(arguments: Arguments) -> int:
    """Write the export; returns the exit status."""
    run, out = Path(arguments.run), Path(arguments.out)
    if not arguments.out:
        raise ConfigError("--out DIR is needed: a new directory for the export")
    if arguments.layout not in LOADERS:
        raise ConfigError(f"--layout {arguments.layout!r} is unknown; expected one of {', '.join(LOADERS)}")
    if not is_run(run):
        raise ConfigError(f"{run} is not a run directory: it has no checkpoints")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists; choose a new directory")
    checkpoint, towers = latest_of_run(run), load_towers(run)
    vision, side = towers.vision, towers.text_side
    if arguments.layout == "two_towers" and side is None:
        raise ConfigError(f"{run} is of stage 1 and has no text tower; leave --layout two_towers out")
    try:
        if arguments.layout == "glm_ocr":
            save_glm_ocr(out, vision)
        else:
            vision.save_pretrained(out)
        if arguments.layout == "two_towers" and side is not None:
            write_text_side(out, asdict(side), text_side_weights(checkpoint))
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None
    num_parameters = sum(parameter.numel() for parameter in vision.parameters())
    loader = LOADERS[arguments.layout]
    print(
        f"{checkpoint} -> {out}: {num_parameters:,} parameters; load them with {loader}.from_pretrained({str(out)!r})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], __doc__, Arguments, export))
