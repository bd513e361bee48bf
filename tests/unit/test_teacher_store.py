from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvit.batch import SampleRef
from cogvit.errors import ConfigError, DataError
from cogvit.teacher.store import StoreFeatures, contents_of, headers_of, is_complete, path_of, write_shard
from cogvit.teacher.stream import FeatureRequest, LocalFeatures
from cogvit.teacher.zoo import load_teacher
from tests import teachers

SHARDS = ("data/first.tar", "data/second.tar")
GRIDS = ((3, 3), (2, 5), (4, 4))
SAMPLES = tuple(SampleRef(10 * shard + n, SHARDS[shard], 0, 0) for shard in range(2) for n in range(1, 4))
FINGERPRINTS = {"siglip2": "a" * 64, "dinov3": "b" * 64}


def contents(grids: tuple[tuple[int, int], ...] = GRIDS, content_hash: int = 5) -> dict[str, str]:
    rows = np.zeros(6, [("shard", np.int32), ("sample_id", np.int64), ("content_hash", np.int64)])
    rows["shard"] = np.repeat([0, 1], 3)
    rows["sample_id"] = [sample.sample_id for sample in SAMPLES]
    rows["content_hash"] = content_hash
    return contents_of(SHARDS, rows, np.array(grids * 2))


def request(places: tuple[int | None, ...], mask_ratio: float) -> FeatureRequest:
    """Ask for some of SAMPLES; the decoder of the tests draws by sample id and key, so each has one key."""
    return FeatureRequest(
        tuple(None if place is None else SAMPLES[place] for place in places),
        tuple((0, 0) if place is None else GRIDS[place % 3] for place in places),
        tuple(7 for _ in places),
        mask_ratio,
    )


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> LocalFeatures:
    paths = teachers.write_teachers(tmp_path_factory.mktemp("teachers"))
    return LocalFeatures({name: load_teacher(path, "fp32") for name, path in paths.items()}, teachers.draw)


@pytest.fixture
def directory(local: LocalFeatures, tmp_path: Path) -> Path:
    headers = headers_of(FINGERPRINTS, contents(), "fp32")
    for number, shard in enumerate(("first.tar", "second.tar")):
        places = tuple(range(3 * number, 3 * number + 3))
        features = local.result(request(places, 1.0))
        for name in FINGERPRINTS:
            path, header = path_of(tmp_path, name, shard), headers[name, shard]
            assert not is_complete(path, header)
            pieces: tuple[Tensor, ...] = features[name].split([9, 10, 16])
            write_shard(path, header, [SAMPLES[place].sample_id for place in places], pieces)
            assert is_complete(path, header)
    return tmp_path


def open_store(directory: Path, fingerprints: dict[str, str] = FINGERPRINTS, **changed: object) -> StoreFeatures:
    precision = str(changed.pop("precision", "fp32"))
    headers = headers_of(fingerprints, contents(**changed), precision)  # type: ignore[arg-type]
    return StoreFeatures(directory, headers, dict.fromkeys(FINGERPRINTS, 32))


@pytest.mark.parametrize("mask_ratio", [1.0, 0.35])
def test_the_store_answers_as_the_teachers_do_to_the_bit_where_the_batch_is_the_same(
    local: LocalFeatures, directory: Path, mask_ratio: float
) -> None:
    store = open_store(directory)
    asked = request((3, 4, 5), mask_ratio)
    stored, computed = store.result(store.submit(asked)), local.result(asked)
    assert store.dims == local.dims
    for name in FINGERPRINTS:
        assert stored[name].dtype == torch.float32 and torch.equal(stored[name], computed[name])


def test_images_come_from_their_shards_in_the_order_of_the_slots(local: LocalFeatures, directory: Path) -> None:
    asked = request((5, None, 0, 4), 0.35)
    stored, computed = open_store(directory).result(asked), local.result(asked)
    for name in FINGERPRINTS:
        torch.testing.assert_close(stored[name], computed[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"fingerprints": FINGERPRINTS | {"siglip2": "c" * 64}}, "teacher"),
        ({"grids": ((3, 3), (5, 2), (4, 4))}, "contents"),
        ({"content_hash": 6}, "contents"),
        ({"precision": "bf16"}, "precision"),
    ],
)
def test_a_store_of_something_else_is_refused_by_name(directory: Path, changed: dict, field: str) -> None:
    with pytest.raises(ConfigError, match=f"siglip2/first.tar.safetensors was made with other {field} than"):
        open_store(directory, **changed).result(request((0,), 0.35))


def test_a_truncated_or_missing_file_is_named(directory: Path) -> None:
    path = path_of(directory, "siglip2", "first.tar")
    path.write_bytes(path.read_bytes()[:-4])
    assert not is_complete(path, headers_of(FINGERPRINTS, contents(), "fp32")["siglip2", "first.tar"])
    with pytest.raises(DataError, match=r"first\.tar\.safetensors is damaged"):
        open_store(directory).result(request((0,), 0.35))
    path.unlink()
    with pytest.raises(ConfigError, match=r"python -m tools\.precompute_features"):
        open_store(directory).result(request((0,), 0.35))


def test_bf16_features_stay_two_bytes_on_disk(local: LocalFeatures, tmp_path: Path) -> None:
    features = local.result(request((0,), 1.0))["siglip2"].bfloat16()
    path = tmp_path / "shard.safetensors"
    write_shard(path, {}, [1], [features])
    assert 9 * 32 * 2 < path.stat().st_size < 9 * 32 * 4


def test_shards_of_one_name_are_refused() -> None:
    rows = np.zeros(2, [("shard", np.int32), ("sample_id", np.int64), ("content_hash", np.int64)])
    rows["shard"] = [0, 1]
    with pytest.raises(ConfigError, match=r"two shards are named x\.tar"):
        contents_of(("a/x.tar", "b/x.tar"), rows, np.ones((2, 2), np.int64))
