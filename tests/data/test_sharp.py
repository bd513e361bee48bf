"""Images as a second encoder sees them: in the samples' order, in slices, none that does not decode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogvit.batch import Batch, SharpImages, pad_step
from cogvit.config import RunConfig
from cogvit.model.config import CrossModuleConfig
from data_pipeline.index import Index
from data_pipeline.loader import step_loader
from data_pipeline.topology import Slice
from tests.conversations import PATCH_PX, indexed, said, stage3, talk, write_language_model, write_talks
from tests.data.corpus import write_tar
from tests.data.test_talks import seat_of, take

CROSS = CrossModuleConfig(16, PATCH_PX, 64, 2, 1, 48, 32)  # sees what the first encoder sees


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return indexed(write_talks(tmp_path_factory.mktemp("shards")))


def crossed(language: Path) -> RunConfig:
    config = stage3("", language, max_patches=16, min_patches=0)
    return replace(config, data=replace(config.data, sizing="square"), cross=CROSS)


def of(batch: Batch) -> SharpImages:
    assert batch.sharp is not None
    return batch.sharp


def test_they_lie_in_the_order_of_the_samples(corpus: Index, language: Path) -> None:
    config, several = crossed(language), 0
    for step in take(corpus, config, 3):
        for batch in step.micro:
            sequence, sharp = batch.sequence, of(batch)
            assert sequence is not None and len(sharp.count) == config.data.images_per_pack
            images = sharp.patches.split(CROSS.rows_per_image)
            assert len(images) == sum(sharp.count) == int((batch.images.grid_hw[:, 0] > 0).sum())
            shown = iter(images)
            for number, count in enumerate(sharp.count):
                start, stop = sequence.cu_seqlens[number : number + 2].tolist()
                rows = sequence.visual_row[start:stop]
                mine = torch.unique_consecutive(rows[rows >= 0] // 4).tolist()  # 4 tokens an image
                assert len(mine) == count
                several += count > 1
                for image in mine:
                    begin, end = batch.images.cu_seqlens[image : image + 2].tolist()
                    assert torch.equal(next(shown), batch.images.patches[begin:end])
        padded = of(pad_step(step, len(step.micro) + 1).micro[-1])
        assert not len(padded.patches) and not any(padded.count)
    assert several


def test_ranks_decode_a_slice_each_and_later_stages_nothing(corpus: Index, language: Path) -> None:
    config = crossed(language)
    loader, seat = step_loader(corpus, config, reads="conversations"), seat_of(config)
    whole, *parts = (loader.step(replace(seat, decodes=one), 0) for one in (seat.decodes, Slice(0, 2), Slice(1, 2)))
    assert sum(part.decoded for part in parts) == whole.decoded
    for batch, *slices in zip(whole.micro, *(part.micro for part in parts), strict=True):
        assert torch.equal(torch.maximum(*(of(one).patches for one in slices)), of(batch).patches)
    later = loader.step(replace(seat, decodes=None), 0)
    for batch, other in zip(whole.micro, later.micro, strict=True):
        assert of(other).patches.shape == (len(of(batch).patches), 0) and of(other).count == of(batch).count


def test_a_cost_of_its_own_is_planned(corpus: Index, language: Path) -> None:
    config = crossed(language)
    plans = [
        step_loader(corpus, one, reads="conversations") for one in (config, replace(config, cross=CrossModuleConfig()))
    ]
    assert plans[0].plan_hash != plans[1].plan_hash
    first, without = (sorted(plan.planner.batch(0).phases[:, 0].tolist()) for plan in plans)
    assert first[0] == without[0] == 0 and first[-1] > without[-1]


def test_one_that_does_not_decode_silences_its_sample(tmp_path: Path, language: Path) -> None:
    entries = [part for n in range(3) for part in talk(f"k{n}", said("<image><image>?", "yes"), images=2)]
    write_tar(tmp_path / "a.tar", [(name, data[:-40] if name == "k1.1.png" else data) for name, data in entries])
    config = crossed(language)
    data = replace(config.data, canonical_shares=1, global_batch_images=3, lookahead_steps=1)
    (step,) = take(indexed(tmp_path), replace(config, data=data), 1)
    assert step.decoded == 12 and len(step.failures) == 2 and all("k1" in line for line in step.failures)
    blank = [
        image for batch in step.micro for image in of(batch).patches.split(CROSS.rows_per_image) if not image.any()
    ]
    assert len(blank) == 1
