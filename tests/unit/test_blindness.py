"""Other images than a sample's own: whole ones where sizes agree, never the own one, and what is said of the effect."""

from __future__ import annotations

import pytest
import torch

from cogvit.batch import Batch, HostView, PackedImages, PackedSequence
from cogvit.config import RunConfig, ScheduleConfig
from cogvit.objective.blindness import with_other_images
from cogvit.stages import stage_of

Grid = tuple[int, int]


def batch_of(grids: list[Grid], rows: list[int]) -> Batch:
    """A pack in which every token is a row of the adapter's output, or -1."""
    sizes = [high * wide for high, wide in grids]
    images = PackedImages(
        patches=torch.zeros(sum(sizes), 3),
        row_col=torch.zeros(sum(sizes), 2, dtype=torch.int32),
        cu_seqlens=torch.tensor([0, *sizes, 0]).cumsum(0).to(torch.int32),
        grid_hw=torch.tensor(grids, dtype=torch.int32).reshape(-1, 2),
        key=torch.zeros(len(grids), dtype=torch.int64),
        weight=torch.ones(len(grids)),
        host=HostView((*sizes, 0), tuple(grids)),
    )
    ids = torch.zeros(len(rows), dtype=torch.int64)
    sequence = PackedSequence(
        ids, ids.expand(3, -1), torch.tensor([0, len(rows), len(rows)]), torch.tensor(rows), ids, ids.float(), ids[:1]
    )
    return Batch(images, None, None, (None,) * len(grids), sequence)


def shown(grids: list[Grid], rows: list[int]) -> list[int]:
    sequence = with_other_images(batch_of(grids, rows), 2).sequence
    assert sequence is not None
    return sequence.visual_row.tolist()


def test_images_of_one_size_change_places_whole() -> None:
    rows = [-1, *range(4), -1, *range(4, 8), *range(8, 12)]
    assert shown([(4, 4)] * 3, rows) == [-1, *range(8, 12), -1, *range(4), *range(4, 8)]
    assert shown([(4, 4), (4, 4), (0, 0)], [0, 1, 2, 3, -1, 4, 5, 6, 7]) == [4, 5, 6, 7, -1, 0, 1, 2, 3]


def test_images_of_several_sizes_show_parts_of_others() -> None:
    rows = list(range(6 + 1 + 2))
    turned = shown([(4, 6), (2, 2), (2, 4)], rows)
    assert sorted(turned) == rows and all(one != other for one, other in zip(turned, rows, strict=True))


def test_an_image_alone_is_shown_out_of_order_and_none_is_none() -> None:
    assert shown([(4, 4)], [0, 1, 2, 3]) == [2, 3, 0, 1]
    assert shown([(0, 0)], [-1, -1]) == [-1, -1]


@pytest.mark.parametrize(
    ("step", "values", "told"),
    [
        (20, {"image_effect": -0.01}, True),
        (20, {"image_effect": 0.0}, True),
        (20, {"image_effect": 0.2}, False),
        (9, {"image_effect": -0.01}, False),
        (20, {"loss": 1.0}, False),
    ],
)
def test_a_run_that_does_not_look_says_so_once_it_is_warm(step: int, values: dict[str, float], told: bool) -> None:
    config = RunConfig(objective="language", schedule=ScheduleConfig(warmup_steps=10))
    line = stage_of(config).concern(config, step, values)
    assert bool(line) is told and (not told or ("does not look" in line and "\n" not in line))
