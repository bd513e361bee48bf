"""The picture of a batch: pixels of the images that the plan chose, shaded masks, padding of the right size."""

import numpy as np
import pytest
from PIL import Image

from cogvit.config import RunConfig
from cogvit.model.config import CogViTConfig
from cogvit.objective.masking import num_masked
from cogvit.stages.distill import MASK_COLOR, DistillStage
from data_pipeline.assembly import assemble_images
from data_pipeline.decode import decode_patches, read_image
from data_pipeline.loader import pack_limits
from tests.data.corpus import PATCH_PX, indexed, picture, run_config
from tools.view_batch import GAP_PX, PADDING_GRAY, WIDTH_PX, draw_pack, main, unpatchify


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
