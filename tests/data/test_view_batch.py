"""The picture of a batch: pixels of the images that the plan chose, shaded masks, padding of the right size."""

import numpy as np
import pytest
import torch
from PIL import Image

from cogvit.config import RunConfig
from cogvit.model.config import CogViTConfig
from cogvit.model.tokenizer import ByteTokenizer
from cogvit.objective.masking import num_masked
from cogvit.stages.distill import MASK_COLOR, DistillStage
from data_pipeline.assembly import Spoken, assemble_images, assemble_text
from data_pipeline.decode import decode_patches, read_image
from data_pipeline.loader import pack_limits
from tests.data.corpus import PATCH_PX, indexed, picture, run_config
from tools.view_batch import (
    CELL_PX,
    GAP_PX,
    LINE_PX,
    NUM_LINES,
    PADDING_GRAY,
    WIDTH_PX,
    caption_font,
    captions_of,
    draw_pack,
    main,
    unpatchify,
    wrapped,
)


def test_a_pack_is_drawn_as_it_lies(tmp_path):
    config = run_config()
    data = [picture(12, 16, 1), picture(8, 4, 2)]
    grids = np.array([(3, 4), (2, 1)])
    patches = [decode_patches(one, tuple(grid), PATCH_PX) for one, grid in zip(data, grids.tolist(), strict=True)]
    images = assemble_images(patches, grids, np.array([5, 6]), 3 * PATCH_PX**2, pack_limits(config))
    assert np.array_equal(unpatchify(images, 0, PATCH_PX), read_image(data[0]))
    drawn = np.asarray(draw_pack(images, config))
    assert np.array_equal(drawn[:12, :16], read_image(data[0]))
    assert np.array_equal(drawn[:8, 16 + GAP_PX :][:, :4], read_image(data[1]))
    padding_px = (64 - 14) * PATCH_PX**2
    assert 0 <= (drawn == PADDING_GRAY).all(-1).sum() - padding_px < 64  # whole rows
    assert drawn.shape[1] == WIDTH_PX


def test_masked_patches_are_shaded():
    pixels = np.zeros((20, 28, 3), np.uint8)
    shaded = DistillStage().shade(pixels, 3, RunConfig(vision=CogViTConfig(image_size=28, patch_size=4)))
    assert (shaded == np.array(MASK_COLOR) // 3 * 2).all(-1).sum() == num_masked(35, 0.35) * 16


def test_command_draws_and_prints_the_figures(tmp_path, capsys):
    indexed(tmp_path / "shards")
    out = tmp_path / "batch.png"
    flags = ["--data.shards", str(tmp_path / "shards"), "--data.global-batch-images", "12", "--data.max-patches", "20"]
    assert main(["demo_stage2", *flags, "--out", str(out), "--step", "3", "--dp-ranks", "4"]) == 0
    printed = capsys.readouterr().out
    assert "step 3 of plan" in printed and "12 images" in printed
    assert "on each of 4 ranks" in printed and "x the bound" in printed
    with Image.open(out) as image:
        assert image.width == WIDTH_PX and image.height > 150


@pytest.mark.parametrize(
    "argv", [["demo_stage2", "--step", "x"], ["demo_stage2", "--dp-ranks", "0"], ["demo_stage2", "--out", "batch.gif"]]
)
def test_command_refuses_in_one_line(argv, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_captions_stand_under_their_images_as_the_tower_reads_them():
    config = run_config()
    written = ["a cat", "\u4e00\u53ea\u732b", "x" * 90]
    tokens = [ByteTokenizer().encode(text, config.text.max_tokens) for text in written]
    spoken = [Spoken(text, number) for number, text in enumerate(written)]
    limits = pack_limits(config)
    captions = captions_of(assemble_text(spoken, tokens, torch.ones(limits.images), limits), config)
    assert captions == ["a cat", "\u4e00\u53ea\u732b", "x" * 15, "", "", ""] and captions_of(None, config) == []
    grids = np.array([(3, 4), (2, 1), (1, 1)])
    patches = [torch.full((int(rows * columns), 3 * PATCH_PX**2), 255, dtype=torch.uint8) for rows, columns in grids]
    images = assemble_images(patches, grids, np.array([5, 6, 7]), 3 * PATCH_PX**2, limits)
    drawn = np.asarray(draw_pack(images, config, captions))
    for left in (0, CELL_PX + GAP_PX, 2 * (CELL_PX + GAP_PX)):
        below = drawn[3 * PATCH_PX : 3 * PATCH_PX + LINE_PX, left : left + CELL_PX]
        assert (below < 100).any(), left


def test_long_captions_are_broken_and_end_in_an_ellipsis():
    lines = wrapped("\u56fe" * 200, 60)
    assert len(lines) == NUM_LINES and lines[-1][-1] == "\u2026"
    assert all(caption_font().getlength(line) <= 72 for line in lines)
    words = wrapped("a photo of a retina", 70)
    assert len(words) == 2 and " ".join(words) == "a photo of a retina"
    assert wrapped("a dog", 200) == ["a dog"] and wrapped("", 60) == []
