from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cogvit.batch import SampleRef, TeacherTargets, pad_step
from cogvit.config import SUMMARY
from cogvit.errors import ConfigError
from cogvit.objective.masking import mask_tokens
from cogvit.teacher.standardize import ChannelStats, Standardized, fit_stats, hadamard, load_stats, save_stats
from cogvit.teacher.stream import (
    FeatureRequest,
    Features,
    LocalFeatures,
    Pixels,
    attach_targets,
    request_of,
    rows_asked,
    rows_of_images,
)
from cogvit.teacher.targets import Targets
from cogvit.teacher.zoo import Teacher, load_teacher
from tests import teachers
from tests.pool import Pool

PACK = ((1, (3, 3)), (2, (2, 5)), (3, (4, 4)))
FINGERPRINTS = {"siglip2": "a" * 64, "dinov3": "b" * 64}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LocalFeatures:
    paths = teachers.write_teachers(tmp_path_factory.mktemp("teachers"))
    return LocalFeatures({name: load_teacher(path, "fp32") for name, path in paths.items()}, teachers.draw)


def ask(source: LocalFeatures, request: FeatureRequest) -> Features:
    return source.result(source.submit(request))


def test_the_features_are_those_of_the_tokens_that_the_objective_masks(source: LocalFeatures) -> None:
    (batch,) = teachers.step_batch(0, (PACK,)).micro
    everything, masked = (ask(source, request_of(batch, ratio)) for ratio in (1.0, 0.35))
    mask_T = mask_tokens(batch.images, 0.35)
    assert mask_T.sum() == 3 + 4 + 6
    for name in ("siglip2", "dinov3"):
        padding = torch.zeros(40 - 35, 32)
        assert torch.equal(masked[name], torch.cat([everything[name], padding])[mask_T])
        assert masked[name].dtype == torch.float32 and source.dims[name] == 32


def test_an_image_that_does_not_decode_gives_zeros_and_moves_nobody(source: LocalFeatures) -> None:
    grids = ((3, 3), (2, 5), (4, 4))
    sound = ask(source, teachers.request((1, 2, 3), grids, 1.0))
    broken = ask(source, teachers.request((1, teachers.UNREADABLE, 3), grids, 1.0))
    for name in ("siglip2", "dinov3"):
        assert broken[name][9:19].eq(0).all()
        torch.testing.assert_close(broken[name][:9], sound[name][:9], atol=1e-5, rtol=0)
        torch.testing.assert_close(broken[name][19:], sound[name][19:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("sample_ids", [(), (None, None), (teachers.UNREADABLE,)])
def test_a_pack_without_images_has_an_answer(source: LocalFeatures, sample_ids: tuple[int | None, ...]) -> None:
    features = ask(source, teachers.request(sample_ids, ((2, 2),) * len(sample_ids), 0.5))
    num_zeros = 2 * sample_ids.count(teachers.UNREADABLE)
    assert {tuple(x.shape) for x in features.values()} == {(num_zeros, 32)}


def test_the_features_can_be_targets_of_a_loss(source: LocalFeatures) -> None:
    features = ask(source, teachers.request((1,), ((3, 3),), 1.0))["dinov3"]
    student = torch.zeros(9, 32, requires_grad=True)
    F.smooth_l1_loss(student, features).backward()
    assert student.grad is not None and student.grad.ne(0).any()


def test_a_summary_comes_with_the_patches_or_alone_once_an_image(source: LocalFeatures) -> None:
    asked = teachers.request((1, None, teachers.UNREADABLE, 2), ((3, 3), (0, 0), (2, 2), (2, 5)))
    patches = ask(source, asked)["dinov3"]
    teacher = source.teachers["dinov3"]
    assert isinstance(teacher, Teacher)
    both = LocalFeatures({"dinov3": replace(teacher, parts=("", SUMMARY))}, teachers.draw)
    alone = LocalFeatures({"dinov3": replace(teacher, parts=(SUMMARY,))}, teachers.draw)
    assert both.dims == {"dinov3": 32, "dinov3_summary": 32} and alone.dims == {"dinov3_summary": 32}
    found = ask(both, asked)
    assert torch.equal(found["dinov3"], patches) and found["dinov3_summary"].shape == (3, 32)
    assert found["dinov3_summary"][1].eq(0).all() and found["dinov3_summary"][[0, 2]].ne(0).all()
    assert torch.equal(ask(alone, asked)["dinov3_summary"], found["dinov3_summary"])


def test_held_out_images_are_seen_as_they_are(source: LocalFeatures) -> None:
    keys: list[int | None] = []

    def note_key(sample: SampleRef, key: int | None, size_hw_px: tuple[int, int]) -> Pixels | None:
        keys.append(key)
        return teachers.draw(sample, 0, size_hw_px)

    noting = LocalFeatures({"dinov3": source.teachers["dinov3"]}, note_key)
    (batch,) = teachers.step_batch(0, (PACK,)).micro
    ask(noting, request_of(batch, 0.35))
    assert keys == [1, 2, 3]
    keys.clear()
    for step in attach_targets(
        [teachers.step_batch(0, (PACK,))], noting, mask_ratio=0.35, in_flight_steps=1, augmented=False
    ):
        assert step.micro[0].targets is not None
    assert keys == [None] * 3


class Recorder:
    """A source that notes what it is asked, and answers with the first sample's id."""

    def __init__(self) -> None:
        self.dims = {"one": 1}
        self.events: list[tuple[str, int]] = []

    def submit(self, request: FeatureRequest) -> int:
        sample = request.samples[0]
        assert sample is not None
        self.events.append(("submit", sample.sample_id))
        return sample.sample_id

    def result(self, handle: int) -> Features:
        self.events.append(("result", handle))
        return {"one": torch.full((1, 1), float(handle))}


def test_targets_are_attached_in_order_with_the_steps_ahead_requested() -> None:
    packs = [((10 * step + 1, (2, 2)),) for step in range(5)]
    second = [((10 * step + 2, (2, 2)),) for step in range(5)]
    steps = [teachers.step_batch(step, (packs[step], second[step])) for step in range(5)]
    recorder = Recorder()
    attached = attach_targets(iter(steps), recorder, mask_ratio=0.35, in_flight_steps=2)
    first = next(attached)
    submitted = [sample_id for event, sample_id in recorder.events if event == "submit"]
    assert submitted == [1, 2, 11, 12, 21, 22]
    received = [first, *attached]
    assert [step.position.step for step in received] == [1, 2, 3, 4, 5]
    for number, step in enumerate(received):
        values = [batch.targets.features["one"].item() for batch in step.micro if batch.targets is not None]
        assert values == [10 * number + 1, 10 * number + 2]
        assert [batch.images for batch in step.micro] == [batch.images for batch in steps[number].micro]


def requests() -> list[FeatureRequest]:
    return [teachers.request((n, n + 1), ((3, 3), (2, 5)), 1.0) for n in range(20, 40, 2)]


def test_standardized_features_have_mean_zero_and_deviation_one(source: LocalFeatures) -> None:
    stats = fit_stats(source, requests(), FINGERPRINTS, "channel")
    standardized = Standardized(source, stats)
    answers = [standardized.result(standardized.submit(request)) for request in requests()]
    for name in ("siglip2", "dinov3"):
        x = torch.cat([answer[name] for answer in answers]).double()
        assert x.mean(dim=0).abs().max() < 1e-5
        assert (x.std(dim=0, correction=0) - 1).abs().max() < 1e-5


def test_a_constant_channel_becomes_zero_instead_of_noise() -> None:
    stats = fit_stats(Recorder(), [teachers.request((7,), ((1, 1),), 1.0)] * 4, {"one": "f"}, "channel")["one"]

    assert stats.apply(torch.full((3, 1), 7.0)).eq(0).all()
    assert stats.apply(torch.full((3, 1), 8.0)).eq(1).all()


def test_statistics_come_back_to_the_bit_and_only_for_their_teachers(source: LocalFeatures, tmp_path: Path) -> None:
    stats = fit_stats(source, requests(), FINGERPRINTS, "channel")
    path = tmp_path / "run" / "stats.safetensors"
    save_stats(path, stats)
    loaded = load_stats(path, FINGERPRINTS, "channel", "way out")
    for name, fingerprint in FINGERPRINTS.items():
        assert loaded[name].fingerprint == fingerprint
        for part in ("mean", "std"):
            assert torch.equal(getattr(loaded[name], part), getattr(stats[name], part))
    assert [file.name for file in path.parent.iterdir()] == ["stats.safetensors"]
    with pytest.raises(ConfigError, match=r"another teacher 'dinov3' .*; way out$"):
        load_stats(path, FINGERPRINTS | {"dinov3": "c" * 64}, "channel", "way out")
    with pytest.raises(ConfigError, match=r"another teacher 'third' .none, now"):
        load_stats(path, FINGERPRINTS | {"third": "c" * 64}, "channel", "way out")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ConfigError, match="does not read"):
        load_stats(path, FINGERPRINTS, "channel", "way out")


@pytest.mark.parametrize("order", [1, 2, 12, 32, 384, 768, 1152])
def test_a_hadamard_matrix_is_orthogonal_with_entries_of_one_size(order: int) -> None:
    matrix = hadamard(order)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5))


def test_a_width_without_a_hadamard_matrix_is_refused() -> None:
    with pytest.raises(ConfigError, match="no rotation for a width of 36"):
        hadamard(36)  # it exists, by another construction


def test_phi_s_gives_every_channel_deviation_one_and_keeps_angles(source: LocalFeatures, tmp_path: Path) -> None:
    save_stats(tmp_path / "stats", fit_stats(source, requests(), FINGERPRINTS, "phi_s"))
    with pytest.raises(ConfigError, match=r"not fitted for --teachers.standardize channel; way out$"):
        load_stats(tmp_path / "stats", FINGERPRINTS, "channel", "way out")
    standardized = Standardized(source, load_stats(tmp_path / "stats", FINGERPRINTS, "phi_s", "way out"))
    for name in ("siglip2", "dinov3"):
        raw = torch.cat([ask(source, request)[name] for request in requests()]).double()
        x = torch.cat([ask(standardized, request)[name] for request in requests()]).double()
        assert x.mean(dim=0).abs().max() < 1e-5
        assert (x.std(dim=0, correction=0) - 1).abs().max() < 1e-4
        centered = raw - raw.mean(dim=0)
        scale = raw.var(dim=0, correction=0).mean()
        torch.testing.assert_close(x @ x.T, centered @ centered.T / scale, atol=1e-3, rtol=1e-4)


def test_statistics_need_images(source: LocalFeatures) -> None:
    with pytest.raises(ConfigError, match="at least one image"):
        fit_stats(source, [teachers.request((None,), ((0, 0),), 1.0)], FINGERPRINTS, "channel")


def deliver(rank: int, world: int, masked: float) -> tuple[list[Features], list[tuple[str, int]]]:
    """A step of two packs and one of padding, of which rank 0 has the features; counts the broadcasts and their bytes.

    "wide" comes in fp32 and "half" in bf16; both as the numbers of their values.
    """
    (step,) = (pad_step(teachers.step_batch(0, (PACK, PACK[:2])), 3),)
    dims, dtypes = {"half": 3, "wide": 2, "wide_summary": 2}, {"half": torch.bfloat16}
    sent: list[tuple[str, int]] = []
    broadcast = dist.broadcast

    def counted(tensor: Tensor, **options: object) -> None:
        sent.append((str(tensor.dtype), tensor.nbytes))
        broadcast(tensor, **options)

    stats = {name: ChannelStats(torch.full((dim,), 1.0), torch.full((dim,), 2.0), "") for name, dim in dims.items()}
    targets = Targets(
        source=Recorder() if rank == 0 else None,
        dims=dims,
        dtypes={name: dtypes.get(name, torch.float32) for name in dims},
        stats=stats,
        mask_ratio=masked,
        group=dist.group.WORLD,
    )
    micro = step.micro
    if rank == 0:
        asked = [request_of(batch, masked) for batch in micro]
        features = [
            {
                name: torch.arange(sum(rows_of_images(name, one)) * dim).view(-1, dim).to(targets.dtypes[name])
                for name, dim in dims.items()
            }
            for one in asked
        ]
        micro = tuple(
            replace(batch, targets=TeacherTargets(found)) for batch, found in zip(micro, features, strict=True)
        )
    dist.broadcast = counted
    try:
        found = [batch.targets.features for batch in targets.delivered(micro) if batch.targets is not None]
    finally:
        dist.broadcast = broadcast
    return found, sent


@pytest.mark.parametrize("masked", [0.35, 1.0])
def test_a_step_reaches_a_replica_in_one_broadcast_and_one_rank_in_none(pool: Pool, masked: float) -> None:
    """The features of 1.0 are those of visible patches too; bytes are those of the rows that are asked for."""
    (alone, nothing), *_ = pool.run(deliver, 1, (masked,))
    assert nothing == []
    rows = 2 * (13 if masked < 1 else 35) - (6 if masked < 1 else 16)
    for found, sent in pool.run(deliver, 2, (masked,)):
        assert sent == [("torch.uint8", rows * (3 * 2 + 2 * 4) + 5 * 2 * 4)]
        for pack, expected in zip(found, alone, strict=True):
            assert pack.keys() == expected.keys()
            for name, x in pack.items():
                assert x.dtype == torch.float32 and torch.equal(x, expected[name])
    assert torch.equal(alone[0]["wide"][1], torch.tensor([0.5, 1.0]))  # 2 and 3, less 1, over 2
    assert [len(pack["half"]) for pack in alone] == [rows - len(alone[1]["half"]), len(alone[1]["half"]), 0]


def test_a_rank_that_trains_on_no_features_gets_none() -> None:
    step = teachers.step_batch(0, (PACK,))
    apart = Targets(source=None, dims={}, dtypes={}, stats={}, mask_ratio=0.35, group=None)
    assert [batch.targets for batch in apart.delivered(step.micro)] == [None]


def test_rows_are_counted_without_masks() -> None:
    """So that a pack of 16,384 patches needs no sorting to know the size of its answer."""
    for grid in ((3, 3), (2, 5), (7, 9), (16, 16)):
        asked = teachers.request((1, None), (grid, (2, 2)), 0.35)
        assert rows_of_images("one", asked) == [int(rows_asked("one", asked, 0).sum())]
    summary = teachers.request((1, None, 2), ((3, 3), (1, 1), (2, 2)), 0.35)
    assert rows_of_images("one" + SUMMARY, summary) == [1, 1]
