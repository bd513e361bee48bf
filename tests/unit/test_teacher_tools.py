from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cogvit.config import SUMMARY, EvalConfig, RunConfig, TeachersConfig
from cogvit.errors import ConfigError
from cogvit.parallel.mesh import start_mesh
from cogvit.stages.distill_targets import _counted, makers_of, sample_requests, shared_targets
from cogvit.teacher.standardize import ChannelStats, Method, Standardized, fit_stats, load_stats, save_stats, try_place
from cogvit.teacher.store import StoreFeatures, path_of
from cogvit.teacher.stream import FeatureRequest, Features, LocalFeatures
from cogvit.teacher.zoo import Grid, Pixels, load_teacher
from data_pipeline.index import open_index
from data_pipeline.loader import image_of
from tests import teachers
from tests.disk import files_of_at_most
from tests.e2e.corpus import write_shards
from tests.pool import Pool
from tests.runs_on_disk import store_run
from tools.demo_corpus import pictograms
from tools.fit_teacher_stats import fit
from tools.fit_teacher_stats import main as fit_teacher_stats
from tools.make_demo_teachers import main as make_demo_teachers
from tools.precompute_features import asked_of, idle_actors, of_summaries, plan_job, run_job, shard_requests, take_dtype
from tools.precompute_features import main as precompute


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    assert make_demo_teachers(["--out", str(path)]) == 0
    return path


def test_the_demos_teachers_are_the_same_bytes_every_time_and_called_untrained(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(5)
    assert make_demo_teachers(["--out", str(tmp_path)]) == 0
    for name in ("siglip2", "dinov3"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == (demo / name / "model.safetensors").read_bytes()
    printed = capsys.readouterr().out
    assert "UNTRAINED" in printed and "--teachers.members.dinov3.path facebook/" in printed
    assert sorted(os.listdir(tmp_path)) == ["dinov3", "siglip2"]


def test_the_demos_teachers_are_made_once_and_replace_nothing_else(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (demo / "siglip2" / "model.safetensors").stat()
    assert make_demo_teachers(["--out", str(demo)]) == 0
    assert (demo / "siglip2" / "model.safetensors").stat() == before
    (tmp_path / "siglip2").mkdir()
    (tmp_path / "siglip2" / "precious").touch()
    assert make_demo_teachers(["--out", str(tmp_path)]) == 2
    assert "siglip2 holds something else" in capsys.readouterr().err
    assert os.listdir(tmp_path / "siglip2") == ["precious"]


def pictures(number: int) -> tuple[list[Pixels], list[Grid]]:
    drawings = [np.array(sample.image) for sample, _ in zip(pictograms.drawings(0, number), range(300), strict=False)]
    return drawings, [(drawing.shape[0] // 8, drawing.shape[1] // 8) for drawing in drawings]


def shrink(image: Pixels, size_hw_px: tuple[int, int]) -> Pixels:
    step = image.shape[0] // size_hw_px[0]
    return np.ascontiguousarray(image[::step, ::step])


@pytest.mark.parametrize("name", ["siglip2", "dinov3"])
def test_a_feature_of_the_demos_teachers_is_partly_told_by_the_rest_of_its_image(demo: Path, name: str) -> None:
    """A linear guess from the mean of the other patches explains 30 % of unseen drawings: there is a lesson."""
    teacher = load_teacher(str(demo / name), "fp32")
    sums = []
    for number in (0, 1):
        images, grids = pictures(number)
        inputs = [shrink(image, teacher.input_px(grid)) for image, grid in zip(images, grids, strict=True)]
        features = teacher.features(inputs, grids)
        rest = torch.cat([(x.sum(dim=0) - x) / (len(x) - 1) for x in features])
        sums.append((torch.cat([rest, torch.ones(len(rest), 1)], dim=1), torch.cat(features)))
    (train_x, train_y), (test_x, test_y) = sums
    weights = torch.linalg.lstsq(train_x, train_y).solution
    std_C = train_y.std(dim=0)
    assert std_C.min() > 0.05  # no channel is dead
    error = ((test_x @ weights - test_y) / std_C).square().mean()
    variance = ((train_y.mean(dim=0) - test_y) / std_C).square().mean()
    assert 0.3 < 1 - error / variance < 0.95


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return store_run(tmp_path_factory.mktemp("world"))


def test_a_store_is_filled_once_and_read_back(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    members = {member.name: load_teacher(member.path, "fp32") for member in config.teachers.members}
    source = LocalFeatures(members, image_of)
    job = plan_job(config)
    assert {Path(shard.path).name: len(shard.rows) for shard in job.shards} == {"a.tar": 70, "b.tar": 5}
    run_job(job, source)
    assert "b.tar: 5 images" in capsys.readouterr().out
    assert plan_job(config).shards == ()
    store = StoreFeatures(job.out, job.makers, job.contents)
    for shard in job.shards:
        for request in shard_requests(shard.index, shard.rows, shard.grid_hw, job.max_tokens):
            stored, computed = store.result(store.submit(request)), source.result(request)
            assert all(torch.equal(stored[name], computed[name]) for name in members)
    next((job.out / "dinov3").glob("a.tar.*")).unlink()
    again = plan_job(config)
    assert [(Path(shard.path).name, shard.lacking) for shard in again.shards] == [("a.tar", ("dinov3",))]
    assert [member.name for member in asked_of(config.teachers, again).members] == ["dinov3"]
    kept = next((job.out / "siglip2").glob("a.tar.*"))
    before = kept.stat()
    run_job(again, LocalFeatures({"dinov3": members["dinov3"]}, image_of))
    assert kept.stat() == before and plan_job(config).shards == ()
    capsys.readouterr()
    run_job(again, LocalFeatures({}, image_of))  # another job has made it in the meantime
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match="was made with dtype fp32, this run's is uint8"):
        run_job(plan_job(config, "uint8"), source)
    assert precompute(["--help"]) == 0


def test_a_request_holds_as_many_patches_as_a_pack(config: RunConfig) -> None:
    shard = plan_job(replace(config, out=config.out + "_requests")).shards[0]
    tokens = shard.grid_hw.prod(axis=1)
    for max_tokens in (1, int(tokens.max()), 50, 10**6):
        asked = list(shard_requests(shard.index, shard.rows, shard.grid_hw, max_tokens))
        assert [one for request in asked for one in request.samples] == [shard.index.ref(int(r)) for r in shard.rows]
        sizes = [[rows * columns for rows, columns in request.grids] for request in asked]
        assert all(len(size) == 1 or (sum(size) <= max_tokens and len(size) <= 64) for size in sizes)
        assert all(len(one) == 64 or sum(one) + after[0] > max_tokens for one, after in pairwise(sizes))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--teachers.actor-cpus", "0"], "teachers.actor_cpus=0.0 must be a share of one above 0"),
        (["--teachers.actors-per-teacher", "0"], "teachers.actors_per_teacher=0 must be at least 1"),
        (["--data.global-batch-images", "0"], "data.global_batch_images=0 must be at least 1"),
        (["--data.sizing", "naflex", "--data.budgets-patches", "[36]"], "holds features of one size of each image"),
    ],
)
def test_a_store_that_no_run_could_read_is_refused_in_one_line(
    words: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert precompute(["demo_stage1", "--out", str(tmp_path / "store"), *words]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_a_store_is_made_with_the_flags_of_its_run(config: RunConfig) -> None:
    """Those of a run that will read it, and those of one that does not because it mirrors its images."""
    mirrored = replace(config.data, flip=True, crop=0.5, color=0.1)
    stored = replace(config.teachers, source="store_then_online", store="store")
    run = replace(config, out=config.out + "_flags")
    assert plan_job(run).contents == plan_job(replace(run, data=mirrored, teachers=stored)).contents


@dataclass
class Watched:
    """Another source; what was asked for and what lay on the disk, unfinished, whenever an answer was taken."""

    source: LocalFeatures
    out: Path
    num_asked: int = 0
    seen: list[tuple[int, int]] = field(default_factory=list)  # requests, bytes

    @property
    def dims(self) -> Mapping[str, int]:
        return self.source.dims

    def submit(self, request: FeatureRequest) -> FeatureRequest:
        self.num_asked += 1
        return self.source.submit(request)

    def result(self, handle: FeatureRequest) -> Features:
        self.seen.append((self.num_asked, sum(path.stat().st_size for path in self.out.rglob("*.part"))))
        return self.source.result(handle)


def test_answers_are_written_as_they_come_with_requests_under_way_across_shards(
    config: RunConfig, tmp_path: Path
) -> None:
    """a.tar is two requests and b.tar one, which is under way before the first answer is taken."""
    members = {member.name: load_teacher(member.path, "fp32") for member in config.teachers.members}
    job = plan_job(replace(config, out=str(tmp_path)))
    source = Watched(LocalFeatures(members, image_of), tmp_path)
    run_job(job, source, in_flight=2)
    first = int(job.shards[0].grid_hw[:64].prod(axis=1).sum()) * 64 * 4  # bytes of an answer by both teachers, fp32
    asked, unfinished = zip(*source.seen, strict=True)
    assert asked == (3, 3, 3)
    assert unfinished[0] < first <= unfinished[1] and unfinished[2] < first
    assert plan_job(replace(config, out=str(tmp_path))).shards == ()


def test_a_limit_that_leaves_actors_without_work_is_said(config: RunConfig) -> None:
    job = plan_job(replace(config, out=config.out + "_idle"))
    request_bytes = int(job.shards[0].grid_hw[:64].prod(axis=1).sum()) * 64 * 4
    crowd = replace(config.teachers, actors_per_teacher=4, max_in_flight_bytes=2 * request_bytes)
    assert "only 2 of 4 actors of a teacher have work" in idle_actors(crowd, job)
    assert f"; {8 * request_bytes} keeps all of them busy" in idle_actors(crowd, job)
    assert idle_actors(replace(crowd, actors_per_teacher=2), job) == ""


def test_a_store_of_summaries_has_one_feature_an_image_of_every_teacher(config: RunConfig) -> None:
    members = {member.name: load_teacher(member.path, "fp32", parts=(SUMMARY,)) for member in config.teachers.members}
    source = LocalFeatures(members, image_of)
    job = plan_job(of_summaries(replace(config, out=config.out + "_summaries")))
    assert job.makers.keys() == {"siglip2_summary", "dinov3_summary"} == source.dims.keys()
    run_job(job, source)
    assert {path.name for path in job.out.iterdir()} == {*job.makers, "lock", "lock.manifests"}
    store = StoreFeatures(job.out, job.makers, job.contents)
    for shard in job.shards:
        for request in shard_requests(shard.index, shard.rows, shard.grid_hw, job.max_tokens):
            stored, computed = store.result(store.submit(request)), source.result(request)
            assert all(torch.equal(stored[name], computed[name]) for name in job.makers)
            assert len(stored["dinov3_summary"]) == len(request.samples)


def test_summaries_of_a_store_of_bytes_are_floats(config: RunConfig) -> None:
    members = {member.name: load_teacher(member.path, "fp32", parts=(SUMMARY,)) for member in config.teachers.members}
    run = of_summaries(replace(config, out=config.out + "_bytes"))
    source, job = LocalFeatures(members, image_of), plan_job(run, "uint8")
    run_job(job, source)
    assert plan_job(run, "uint8").shards == ()
    store = StoreFeatures(job.out, job.makers, job.contents)
    shard = job.shards[0]
    request = next(shard_requests(shard.index, shard.rows, shard.grid_hw, job.max_tokens))
    stored, computed = store.result(store.submit(request)), source.result(request)
    assert all(torch.equal(stored[name], computed[name]) for name in job.makers)
    size = path_of(job.out, "dinov3_summary", shard.path, shard.contents).stat().st_size
    assert len(shard.rows) * 32 * 4 < size < len(shard.rows) * (32 * 4 + 24) + 2048


def test_tokens_is_all_or_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert precompute(["demo_stage1", "--tokens", "some"]) == 2
    assert capsys.readouterr().err == "error: --tokens some is none of all, summary\n"


@pytest.mark.parametrize("method", ["channel", "phi_s"])
def test_statistics_of_a_sample_are_written_for_runs_and_are_their_teachers_alone(
    config: RunConfig, tmp_path: Path, method: Method, capsys: pytest.CaptureFixture[str]
) -> None:
    members = {member.name: load_teacher(member.path, "fp32") for member in config.teachers.members}
    store = replace(config, out=str(tmp_path / "store"))
    run_job(plan_job(store), LocalFeatures(members, image_of))
    teachers_config = replace(config.teachers, source="store", store=store.out, standardize=method)
    run = replace(config, out=str(tmp_path / "stats"), teachers=teachers_config)
    fit(run, 1000)
    assert "of 75 images at least" in capsys.readouterr().out
    makers, index = makers_of(run.teachers), open_index(run.data, run.data.shards)
    fingerprints = {name: maker.fingerprint for name, maker in makers.items()}
    stats = load_stats(tmp_path / "stats", fingerprints, method, "fit them anew")
    asked = _counted(sample_requests(run, index), 75)
    standardized = Standardized(LocalFeatures(members, image_of), stats)
    answers = [standardized.result(standardized.submit(request)) for request in asked]
    for name in members:
        x = torch.cat([one[name] for one in answers])
        assert x.mean(dim=0).abs().max() < 1e-4 and (x.std(dim=0) - 1).abs().max() < 1e-2
    with pytest.raises(ConfigError, match=r"was fitted on another teacher 'dinov3' .*; fit them anew"):
        load_stats(tmp_path / "stats", fingerprints | {"dinov3": "0" * 64}, method, "fit them anew")


def first_answer(rank: int, world: int, run: RunConfig) -> Features:
    """What a run's first pack gets from its source, standardized."""
    mesh, index = start_mesh(run.parallel), open_index(run.data, run.data.shards)
    targets = shared_targets(run, index, None, mesh)
    assert targets.source is not None
    source = Standardized(targets.source, targets.stats)
    return source.result(source.submit(next(sample_requests(run, index))))


def test_a_run_that_is_given_none_fits_what_the_tool_fits(config: RunConfig, tmp_path: Path, pool: Pool) -> None:
    members = {member.name: load_teacher(member.path, "fp32") for member in config.teachers.members}
    job = plan_job(replace(config, out=str(tmp_path / "store")))
    run_job(job, LocalFeatures(members, image_of))
    stored = replace(config.teachers, source="store", store=str(job.out))
    fit(replace(config, out=str(tmp_path / "tool"), teachers=stored), 40)
    for images, same in ((40, True), (4096, False)):
        run = replace(config, out=str(tmp_path / f"run{images}"), teachers=replace(stored, stats_images=images))
        pool.run(first_answer, 1, (run,))
        own, theirs = load_file(Path(run.out) / "teacher_stats.safetensors"), load_file(tmp_path / "tool")
        assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own) == same


def test_a_run_takes_the_statistics_that_it_is_given_and_keeps_them(
    config: RunConfig, tmp_path: Path, pool: Pool
) -> None:
    members = {member.name: load_teacher(member.path, "fp32") for member in config.teachers.members}
    job = plan_job(replace(config, out=str(tmp_path / "store")))
    run_job(job, LocalFeatures(members, image_of))
    stored = replace(config.teachers, source="store", store=str(job.out), stats=str(tmp_path / "stats"))
    run = replace(config, out=str(tmp_path / "run"), teachers=stored)
    fingerprints = {name: maker.fingerprint for name, maker in job.makers.items()}
    halved = {name: ChannelStats(torch.zeros(32), torch.full((32,), 2.0), each) for name, each in fingerprints.items()}
    save_stats(tmp_path / "stats", halved)
    (answer,) = pool.run(first_answer, 1, (run,))
    raw = StoreFeatures(job.out, job.makers, job.contents)
    request = next(sample_requests(run, open_index(run.data, run.data.shards)))
    found = raw.result(raw.submit(request))
    assert all(torch.equal(2 * answer[name], features) for name, features in found.items())
    other = {name: replace(one, fingerprint="0" * 64) for name, one in halved.items()}
    save_stats(tmp_path / "stats", other)
    (kept,) = pool.run(first_answer, 1, (run,))  # a resumed run
    assert all(torch.equal(kept[name], answer[name]) for name in answer)
    with pytest.raises(ConfigError, match=r"stats was fitted on another teacher .*; fit them anew"):
        pool.run(first_answer, 1, (replace(run, out=str(tmp_path / "new")),))


@pytest.mark.parametrize("method", ["channel", "phi_s"])
def test_images_that_do_not_decode_do_not_move_the_statistics(method: Method) -> None:
    source = LocalFeatures({"own": load_teacher("tests.teachers:own", "fp32", parts=("", SUMMARY))}, teachers.draw)
    fingerprints = {name: "f" for name in source.dims}
    grids = ((3, 3), (2, 5), (4, 4))
    sound = teachers.request((1, 2, None, 3), (*grids[:2], (0, 0), grids[2]))
    holed = teachers.request((1, 2, teachers.UNREADABLE, 3), (*grids[:2], (5, 5), grids[2]))
    stats, same = (fit_stats(source, [request], fingerprints, method) for request in (sound, holed))
    for name in stats:
        tensors = zip(vars(stats[name]).values(), vars(same[name]).values(), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in tensors)
    nothing = teachers.request((teachers.UNREADABLE, None), ((3, 3), (0, 0)))
    with pytest.raises(ConfigError, match="need at least one image that decodes"):
        fit_stats(source, [nothing], fingerprints, method)


def test_statistics_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    stats = {"one": ChannelStats(torch.zeros(2000), torch.ones(2000), "f")}
    refused = r"^cannot write [^\n]*; make room or choose another --out$"
    for write in (try_place, partial(save_stats, stats=stats)):
        with pytest.raises(ConfigError, match=refused):
            write(tmp_path / "file" / "stats")
    with files_of_at_most(2048), pytest.raises(ConfigError, match=refused):
        save_stats(tmp_path / "stats", stats)
    try_place(tmp_path / "deep" / "stats")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "file"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["demo_stage1"], "--out FILE is needed"),
        (["demo_stage1", "--images", "many"], "--images many must be a whole number above 0"),
        (["demo_stage1", "--out", "."], "--out . is a directory"),
        (["demo_stage2", "--out", "x"], "the preset has no teachers"),
        (["demo_stage1", "--out", "x", "--teachers.source", "store"], "needs --teachers.store DIR"),
    ],
)
def test_statistics_that_cannot_be_fitted_are_refused_in_one_line(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit_teacher_stats(words) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_held_out_shards_of_the_same_names_are_stored_with_the_training_shards(config: RunConfig) -> None:
    write_shards(Path(config.out).parent / "heldout", "a", 3)
    data = replace(config.data, eval_shards=str(Path(config.out).parent / "heldout"))
    job = plan_job(replace(config, data=data, eval=EvalConfig(every_steps=1), out=config.out + "_both"))
    names = [Path(shard.path).parts[-2:] for shard in job.shards]
    assert names == [("shards", "a.tar"), ("shards", "b.tar"), ("heldout", "a.tar")]


def test_the_dtype_is_taken_out_of_the_trainers_flags() -> None:
    assert take_dtype(["--out", "x"]) == (None, ["--out", "x"])
    assert take_dtype(["--dtype", "uint8", "--out", "x"]) == ("uint8", ["--out", "x"])
    assert take_dtype(["--out", "x", "--dtype=fp16"]) == ("fp16", ["--out", "x"])
    with pytest.raises(ConfigError, match="--dtype int4 is none of fp32, bf16, fp16, uint8"):
        take_dtype(["--dtype", "int4"])
    for words in (["--dtype"], ["--dtype", "--out", "x"]):
        with pytest.raises(ConfigError, match="--dtype needs a value"):
            take_dtype(words)


def test_a_store_needs_a_place_and_teachers(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="--out DIR"):
        plan_job(replace(config, out=""))
    with pytest.raises(ConfigError, match="no teachers"):
        plan_job(replace(config, teachers=TeachersConfig()))
