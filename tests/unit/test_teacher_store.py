from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cogvit.batch import SampleRef
from cogvit.errors import CogViTError, ConfigError, DataError
from cogvit.teacher.encoding import StoreDtype, decode, encode
from cogvit.teacher.shard import open_shard, shard_writer, write_shard
from cogvit.teacher.store import Maker, StoreFeatures, contents_of, header_of, is_complete, path_of, writing
from cogvit.teacher.stream import FeatureRequest, Features, FirstThen, LocalFeatures
from cogvit.teacher.zoo import load_teacher
from tests import teachers
from tests.disk import files_of_at_most
from tools.verify_features import Arguments, verify

SHARDS = ("data/first.tar", "data/second.tar")
GRIDS = ((3, 3), (2, 5), (4, 4))
SAMPLES = tuple(SampleRef(10 * shard + n, SHARDS[shard], 0, 0) for shard in range(2) for n in range(1, 4))
MAKERS = {"siglip2": Maker("a" * 64, "fp32", 32), "dinov3": Maker("b" * 64, "fp32", 32)}


def contents(grids: tuple[tuple[int, int], ...] = GRIDS, content_hash: int = 5) -> dict[str, str]:
    ids = np.array([sample.sample_id for sample in SAMPLES])
    found = (contents_of(ids[n : n + 3], np.full(3, content_hash), np.array(grids)) for n in (0, 3))
    return dict(zip(SHARDS, found, strict=True))


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


def fill(store: Path, local: LocalFeatures, dtype: StoreDtype = "fp32", shards: tuple[str, ...] = SHARDS) -> Path:
    """Write what the teachers say about SAMPLES, 64 images or less a request as the tool does."""
    with writing(store, MAKERS, dtype):
        for shard in shards:
            places = tuple(place for place, sample in enumerate(SAMPLES) if sample.shard == shard)
            features = local.result(request(places, 1.0))
            for name, maker in MAKERS.items():
                path = path_of(store, name, shard, contents()[shard])
                header = header_of(maker, dtype, contents()[shard])
                assert not is_complete(path, header)
                pieces: tuple[Tensor, ...] = features[name].split([9, 10, 16])
                write_shard(path, header, [SAMPLES[place].sample_id for place in places], pieces)
                assert is_complete(path, header)
    return store


@pytest.fixture
def directory(local: LocalFeatures, tmp_path: Path) -> Path:
    return fill(tmp_path / "store", local)


def first_file(directory: Path) -> Path:
    return path_of(directory, "siglip2", SHARDS[0], contents()[SHARDS[0]])


def open_store(directory: Path) -> StoreFeatures:
    return StoreFeatures(directory, MAKERS, contents())


def ask(store: StoreFeatures, asked: FeatureRequest) -> Features:
    return store.result(store.submit(asked))


@pytest.mark.parametrize("mask_ratio", [1.0, 0.35])
def test_the_store_answers_as_the_teachers_do_to_the_bit_where_the_batch_is_the_same(
    local: LocalFeatures, directory: Path, mask_ratio: float
) -> None:
    store = open_store(directory)
    asked = request((3, 4, 5), mask_ratio)
    stored, computed = ask(store, asked), local.result(asked)
    assert store.dims == local.dims
    for name in MAKERS:
        assert stored[name].dtype == torch.float32 and torch.equal(stored[name], computed[name])


def test_images_come_from_their_shards_in_the_order_of_the_slots(local: LocalFeatures, directory: Path) -> None:
    asked = request((5, None, 0, 4), 0.35)
    stored, computed = ask(open_store(directory), asked), local.result(asked)
    for name in MAKERS:
        torch.testing.assert_close(stored[name], computed[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fingerprint": "c" * 64}, r"siglip2 was made with fingerprint aaaaaaaaaaaa, this run's is cccccccccccc"),
        ({"precision": "bf16"}, r"siglip2 was made with precision fp32, this run's is bf16"),
        ({"dim": 48}, r"siglip2 was made with dim 32, this run's is 48"),
    ],
)
def test_a_store_of_another_teacher_is_refused_by_reader_and_writer(
    directory: Path, changed: dict, message: str
) -> None:
    other = MAKERS | {"siglip2": replace(MAKERS["siglip2"], **changed)}
    with pytest.raises(ConfigError, match=message + r"; pass another --teachers\.store"):
        StoreFeatures(directory, other, contents())
    with pytest.raises(ConfigError, match=message + "; choose another --out"), writing(directory, other, "fp32"):
        pass


def test_a_manifest_that_is_gone_or_nonsense_is_named(directory: Path) -> None:
    path = directory / "siglip2" / "manifest.json"
    for nonsense in ("{", "[]"):
        path.write_text(nonsense)
        with pytest.raises(ConfigError, match=r"manifest\.json is no manifest of a feature store"):
            open_store(directory)
        with pytest.raises(ConfigError, match=r"manifest\.json is no manifest of a feature store"):
            verify(Arguments(str(directory)))
    path.unlink()
    with pytest.raises(ConfigError, match=r"the store has no .*manifest\.json; run python -m tools\.precompute"):
        open_store(directory)
    with pytest.raises(ConfigError, match=r"the store has no .*siglip2/manifest\.json"):
        verify(Arguments(str(directory)))


@pytest.mark.parametrize(
    "changed", [contents(grids=((3, 3), (5, 2), (4, 4))), contents(content_hash=6)], ids=["grids", "bytes"]
)
def test_features_of_other_images_or_grids_are_not_found(directory: Path, changed: dict[str, str]) -> None:
    store = StoreFeatures(directory, MAKERS, changed)
    assert not store.has(SAMPLES[0])
    with pytest.raises(
        ConfigError, match=r"the store has no .*first\.tar.* for the images and grids of data/first\.tar"
    ):
        ask(store, request((0,), 0.35))


def test_a_file_put_under_another_name_is_refused(directory: Path) -> None:
    second = path_of(directory, "siglip2", SHARDS[1], contents()[SHARDS[1]])
    second.write_bytes(first_file(directory).read_bytes())
    with pytest.raises(ConfigError, match=r"second\.tar.* was made with other contents than this run's"):
        ask(open_store(directory), request((3,), 0.35))


def test_a_truncated_or_missing_file_is_named(directory: Path) -> None:
    path = first_file(directory)
    path.write_bytes(path.read_bytes()[:-4])
    assert not is_complete(path, header_of(MAKERS["siglip2"], "fp32", contents()[SHARDS[0]]))
    with pytest.raises(DataError, match=r"first\.tar.* is damaged"):
        ask(open_store(directory), request((0,), 0.35))
    path.unlink()
    with pytest.raises(ConfigError, match=r"python -m tools\.precompute_features"):
        ask(open_store(directory), request((0,), 0.35))


@pytest.mark.parametrize("part", ["rows", "start", "checksum", "sample_id"])
def test_a_flipped_byte_is_found_wherever_it_is(directory: Path, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(Arguments(str(directory))) == 0
    path = first_file(directory)
    data = bytearray(path.read_bytes())
    header_bytes = int.from_bytes(data[:8], "little")
    start, _ = json.loads(data[8 : 8 + header_bytes])[part]["data_offsets"]
    data[8 + header_bytes + start + 8] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"first\.tar.* is damaged"):
        ask(open_store(directory), request((0, 1, 2), 0.35))
    capsys.readouterr()
    assert verify(Arguments(str(directory))) == 2
    assert "is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "flipped", "reason"),
    [
        (b'"rows"', b'"sows"', "is damaged"),
        (b'"start"', b'"suart"', "is damaged"),
        (b'"F32"', b'"I32"', "is damaged"),
        (b'"dtype": "fp32"', b'"dtypd": "fp32"', "was made with other dtyp"),
    ],
)
def test_a_flipped_byte_in_a_name_is_found(directory: Path, name: bytes, flipped: bytes, reason: str) -> None:
    path = first_file(directory)
    data = path.read_bytes()
    assert data.count(name) == 1
    path.write_bytes(data.replace(name, flipped))
    with pytest.raises(CogViTError, match=rf"first\.tar.* {reason}"):
        ask(open_store(directory), request((0, 1, 2), 0.35))


def test_an_image_or_a_grid_that_is_not_in_the_file_is_named(directory: Path) -> None:
    store, asked = open_store(directory), request((0, 1), 0.35)
    larger = replace(asked, grids=((3, 4), (2, 5)))
    with pytest.raises(DataError, match=r"first\.tar.* has 9 features of sample 1, and the run's grid wants 12; run "):
        ask(store, larger)
    stranger = replace(asked, samples=(replace(SAMPLES[0], sample_id=77), SAMPLES[1]))
    with pytest.raises(DataError, match=r"first\.tar.* has no features of sample 77; remove it and run "):
        ask(store, stranger)


def test_a_disk_that_does_not_read_is_an_error_of_one_line(directory: Path) -> None:
    shard, _ = open_shard(first_file(directory))
    elsewhere = os.open(directory, os.O_RDONLY)
    os.dup2(elsewhere, shard.file.fileno())  # a directory, which no system reads as a file
    os.close(elsewhere)
    with pytest.raises(DataError, match=r"^cannot read .*first\.tar.*: .*Is a directory; remove it and run [^\n]*$"):
        shard.read(1)


@pytest.mark.parametrize(
    ("dtype", "value"), [("fp32", np.nan), ("bf16", -np.inf), ("fp16", 1e6), ("uint8", np.nan), ("uint8", np.inf)]
)
def test_features_that_are_not_finite_are_not_stored(tmp_path: Path, dtype: StoreDtype, value: float) -> None:
    features = [torch.zeros(3, 32), torch.zeros(4, 32)]
    features[1][2, 5] = value
    header = header_of(MAKERS["siglip2"], dtype, "c")
    with pytest.raises(DataError, match=rf"of sample 4 for .*a\.safetensors are not finite in {dtype}; look at"):
        write_shard(tmp_path / "a.safetensors", header, [7, 4], features)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_half_written(directory: Path, local: LocalFeatures) -> None:
    path = first_file(directory)
    header = header_of(MAKERS["siglip2"], "fp32", contents()[SHARDS[0]])
    before = path.read_bytes()
    with files_of_at_most(2048), pytest.raises(DataError, match=r"cannot write .*first\.tar.*make room"):
        write_shard(path, header, [1], [torch.zeros(100, 32)])
    assert path.read_bytes() == before
    assert not list(directory.rglob("*.part"))


def test_a_shard_is_written_whole_or_not_at_all(directory: Path) -> None:
    """Whatever ends the block: here a teacher that fails after the first image."""
    path = first_file(directory)
    header, before = header_of(MAKERS["siglip2"], "fp32", contents()[SHARDS[0]]), path.read_bytes()
    with pytest.raises(RuntimeError), shard_writer(path, header, [1, 2], [3, 3], 32) as append:
        append(torch.zeros(3, 32))
        assert path.with_name(f"{path.name}.part").stat().st_size >= 3 * 32 * 4
        raise RuntimeError
    assert path.read_bytes() == before
    assert not list(directory.rglob("*.part"))


def test_a_store_that_takes_no_manifest_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = r"cannot write to the store .*: .*; make room or choose another --out"
    with pytest.raises(ConfigError, match=refused), writing(tmp_path / "file", MAKERS, "fp32"):
        pass
    with files_of_at_most(16), pytest.raises(ConfigError, match=refused), writing(tmp_path / "full", MAKERS, "fp32"):
        pass
    assert not list(tmp_path.rglob("manifest.json"))


HOLDER = """
import sys, time
from pathlib import Path
from cogvit.teacher.store import writing
with writing(Path(sys.argv[1]), {}, "fp32"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_what_other_jobs_are_writing_is_left_alone_until_they_die(directory: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(directory)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    left = first_file(directory).with_name("left.part")
    left.touch()
    with writing(directory, MAKERS, "fp32"):
        assert left.exists()
    holder.kill()
    holder.communicate()
    with writing(directory, MAKERS, "fp32"):
        assert not left.exists()


@pytest.mark.parametrize(
    ("dtype", "bytes_per_value", "close"), [("bf16", 2, 2**-8), ("fp16", 2, 2**-10), ("uint8", 1, None)]
)
def test_a_store_in_fewer_bytes(
    local: LocalFeatures, tmp_path: Path, dtype: StoreDtype, bytes_per_value: int, close: float | None
) -> None:
    store = open_store(fill(tmp_path / "store", local, dtype))
    stored, computed = ask(store, request((0, 1, 2), 1.0)), local.result(request((0, 1, 2), 1.0))
    for name in MAKERS:
        if close is not None:
            torch.testing.assert_close(stored[name].float(), computed[name], atol=1e-6, rtol=close)
        assert stored[name].dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)  # as it travels
        assert (1 - torch.cosine_similarity(stored[name].double(), computed[name].double())).max() < 5e-4
    scales = 3 * 2 * 4 * 32 if dtype == "uint8" else 0
    size = first_file(tmp_path / "store").stat().st_size
    assert 35 * 32 * bytes_per_value + scales < size < 35 * 32 * bytes_per_value + scales + 2048


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "uint8"])
def test_a_file_is_safetensors_and_gives_what_a_mask_chooses(tmp_path: Path, dtype: StoreDtype) -> None:
    path, header = tmp_path / "a.safetensors", header_of(MAKERS["siglip2"], dtype, "c")
    features = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (2, 5)]
    write_shard(path, header, [7, 4], features)
    tensors, (shard, said) = load_file(path), open_shard(path)
    assert said == header
    assert tensors["sample_id"].tolist() == [7, 4] and tensors["start"].tolist() == [0, 2, 7]
    own = {name: tensors[name][1:] for name in ("low", "span") if name in tensors}
    whole = decode({"rows": tensors["rows"][2:]} | own)
    shard.expect(4)
    assert torch.equal(shard.read(4), whole)
    torch.testing.assert_close(whole, features[1], atol=0.02, rtol=0.01)
    chosen = torch.tensor([True, False, False, True, False])
    assert torch.equal(shard.read(4, chosen), whole[chosen])


def test_bytes_hold_channels_of_any_range_and_constant_ones_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    range_C = torch.tensor([1e-3, 1.0, 300.0, 0.0])
    feature_TC = torch.randn(50, 4, generator=generator) * range_C + torch.tensor([0.0, 50.0, -7.0, 3.0])
    decoded_TC = decode(encode(feature_TC, "uint8"))
    low_C, span_C = feature_TC.amin(dim=0), feature_TC.amax(dim=0) - feature_TC.amin(dim=0)
    place_TC = ((feature_TC - low_C) / span_C.clamp(min=1e-9)).sqrt()
    assert ((decoded_TC - feature_TC).abs() <= (place_TC + 0.002) * span_C / 255 + 1e-6).all()
    assert torch.equal(decoded_TC[:, 3], feature_TC[:, 3])


def test_bytes_hold_tokens_that_are_a_hundredth_of_their_images_largest() -> None:
    """What a convolution with ReLU says of a plain background: few channels, little of each, beside strong ones."""
    generator = torch.Generator().manual_seed(0)
    feature_TC = torch.randn(64, 512, generator=generator).sub_(1).relu_() * torch.logspace(-2, 0, 64)[:, None]
    decoded_TC = decode(encode(feature_TC, "uint8"))
    assert (1 - torch.cosine_similarity(decoded_TC.double(), feature_TC.double())).max() < 5e-4


def test_contents_are_a_hash_of_the_rows_in_their_order() -> None:
    rows = np.array([[8, 0, 2, 3], [6, 0, 6, 7]], "<i8")
    assert contents_of(rows[:, 0], rows[:, 1], rows[:, 2:]) == hashlib.sha256(rows.tobytes()).hexdigest()


def test_shards_of_one_name_lie_side_by_side() -> None:
    found = [contents_of(np.array([number]), np.zeros(1), np.ones((1, 2))) for number in (4, 5)]
    shards = ("a/x.tar", "b/x.tar")
    paths = {path_of(Path("store"), "one", shard, one) for shard, one in zip(shards, found, strict=True)}
    assert len(paths) == 2 and all(path.name.startswith("x.tar.") for path in paths)


def test_a_store_that_lacks_a_shard_is_refused_before_the_first_step(local: LocalFeatures, tmp_path: Path) -> None:
    open_store(fill(tmp_path / "whole", local)).require_all()
    partial = open_store(fill(tmp_path / "partial", local, shards=SHARDS[:1]))
    with pytest.raises(ConfigError, match=r"lacks 1 of 2 shards.* \(data/second\.tar first\).*store_then_online"):
        partial.require_all()


@pytest.mark.parametrize("present", [(), SHARDS[:1], SHARDS])
def test_what_a_store_lacks_comes_from_the_teachers(
    local: LocalFeatures, tmp_path: Path, present: tuple[str, ...]
) -> None:
    with writing(tmp_path, MAKERS, "fp32"):
        for shard in present:
            for name, maker in MAKERS.items():  # numbers that no teacher gives
                header = header_of(maker, "fp32", contents()[shard])
                path = path_of(tmp_path, name, shard, contents()[shard])
                sample_ids = [sample.sample_id for sample in SAMPLES if sample.shard == shard]
                write_shard(path, header, sample_ids, [torch.full((n, 32), 100.0 + n) for n in (9, 10, 16)])
    both = FirstThen(open_store(tmp_path), local)
    asked = request((5, None, 0, 4), 0.35)
    found, computed = both.result(both.submit(asked)), local.result(asked)
    for name in MAKERS:
        sizes = [6, 3, 4]  # masked of 16, 9 and 10
        rows = zip((5, 0, 4), found[name].split(sizes), computed[name].split(sizes), strict=True)
        for place, got, teachers_own in rows:
            if SAMPLES[place].shard in present:
                assert got.eq(100.0 + (9, 10, 16)[place % 3]).all()
            else:
                torch.testing.assert_close(got, teachers_own, atol=1e-5, rtol=0)
