"""Evaluation from shards and checkpoints on disk to figures, and the commands around it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from cogvit.config import DataConfig, RunConfig, TeacherConfig, TeachersConfig
from cogvit.config.arguments import run_command
from cogvit.evaluate import Arguments, evaluate
from cogvit.evaluation.distill import compare
from cogvit.evaluation.features import embed_images, embed_texts, image_features
from cogvit.evaluation.results import Evaluation, read_evaluation
from cogvit.evaluation.samples import pack_rows, rows_of, spread
from cogvit.evaluation.subject import load_subject
from cogvit.model.naflex import naflex_pack
from cogvit.model.tokens import pool_mean
from cogvit.objective.masking import mask_tokens
from cogvit.report.__main__ import Arguments as ReportArguments
from cogvit.report.__main__ import report
from cogvit.teacher.standardize import fit_stats, save_stats
from cogvit.teacher.stream import FeatureRequest, LocalFeatures
from cogvit.teacher.zoo import fingerprint, inspect_teacher, load_teacher
from data_pipeline.decode import read_image
from data_pipeline.index import build_index, load_index
from data_pipeline.loader import image_of
from data_pipeline.shards import read_members
from tests.data.corpus import members, picture, write_tar
from tests.runs_on_disk import NUM_HELDOUT, contrast_run, distill_run, write_shards
from tests.teachers import write_teachers


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def stage2(tmp_path_factory: pytest.TempPathFactory, data: DataConfig) -> Path:
    return contrast_run(tmp_path_factory.mktemp("run") / "stage2", data)


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory, data: DataConfig) -> Path:
    """A run whose heads predict zero and whose statistics were fitted on the held-out images themselves."""
    directory = tmp_path_factory.mktemp("distill")
    paths = write_teachers(directory / "teachers")
    teachers_config = TeachersConfig(members=tuple(TeacherConfig(name, path) for name, path in paths.items()))
    config = RunConfig(data=data, teachers=teachers_config)
    specs = {name: inspect_teacher(path) for name, path in paths.items()}
    run = distill_run(directory / "stage1", config, {name: spec.dim for name, spec in specs.items()})
    index, subject = load_index(data.eval_shards), load_subject(run)
    teachers = {name: load_teacher(path, "fp32") for name, path in paths.items()}
    source = LocalFeatures(teachers, image_of)
    requests = [
        FeatureRequest(
            pack.samples, tuple((r, c) for r, c in pack.images.grid_hw.tolist()), tuple(pack.images.key.tolist()), 1.0
        )
        for pack in pack_rows(index, torch.arange(len(index)).numpy(), subject.sizing)
    ]
    fingerprints = {name: fingerprint(spec) for name, spec in specs.items()}
    save_stats(run / "teacher_stats.safetensors", fit_stats(source, requests, fingerprints, "channel"))
    return run


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command to a status; returns what it printed, which in a failure is one line."""

    def run(*argv: str, status: int = 0) -> str:
        assert run_command(list(argv), "usage", Arguments, evaluate) == status
        captured = capsys.readouterr()
        if status == 0:
            return captured.out
        assert captured.out == "" and captured.err.splitlines()[-1].startswith("error: ")
        return captured.err.splitlines()[-1]

    return run


def test_every_task_of_stage_2(command: Callable[..., str], stage2: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    out.write_text(json.dumps({"earlier": {"metric": {"value": 0.25, "chance": 0.5}}, "knn_colors": {}}))
    printed = command(str(stage2), "--out", str(out))
    figures: Evaluation = json.loads(out.read_text())
    assert figures.pop("earlier") == {"metric": {"value": 0.25, "chance": 0.5}}
    assert list(figures) == [
        "knn_colors", "linear_colors", "zeroshot_colors_en", "zeroshot_colors_zh",
        "retrieval_colors_en", "retrieval_colors_zh", "retrieval_things_en", "retrieval_all_en",
    ]  # fmt: skip
    assert figures["knn_colors"].keys() == {"accuracy", "accuracy_untrained", "accuracy_pixels"}
    assert figures["linear_colors"]["accuracy_pixels"] == {"value": 1.0, "chance": pytest.approx(1 / 3)}
    assert figures["zeroshot_colors_zh"]["accuracy"]["chance"] == pytest.approx(1 / 3)
    # All captions of this source are equal, and three of nine of the other.
    assert figures["retrieval_things_en"].pop("captions_of_training_images") == {"value": 1.0, "chance": 0.0}
    things = {name: tuple(s.values()) for name, s in figures["retrieval_things_en"].items() if "usual" not in name}
    assert set(things.values()) == {(1.0, 1.0)}
    assert figures["retrieval_colors_en"]["text_to_image_r1"]["chance"] == pytest.approx(1 / 3)
    miss = (6 / 9) * (5 / 8) * (4 / 7) * (3 / 6) * (2 / 5)
    assert figures["retrieval_colors_en"]["text_to_image_r5"]["chance"] == pytest.approx(1 - miss)
    assert figures["retrieval_colors_en"]["image_to_text_r5"] == {"value": 1.0, "chance": 1.0}  # of three captions
    assert all(task in printed for task in figures) and "earlier" not in printed


def test_classes_without_captions_and_images_with_several(
    command: Callable[..., str], stage2: Path, tmp_path: Path
) -> None:
    entries = []
    for number in range(6):
        image = picture(16, 16, seed=number)
        if number % 2:
            entries += [(f"{number}.png", image), (f"{number}.cls", str(number % 3).encode())]
        else:
            entries += members(str(number), image, label=number % 3)
    write_tar(tmp_path / "classes" / "s.tar", entries)
    entries = []
    for number in range(4):
        captions = {"en": [f"image {number}", f"image {number}", f"another {number}", "what all are called"]}
        entries += members(str(number), picture(16, 16, seed=number), captions=captions)
    write_tar(tmp_path / "captions" / "s.tar", entries)
    for name in ("classes", "captions"):
        assert all(not report.problems for report in build_index(str(tmp_path / name)))
    prompts = tmp_path / "p.json"
    prompts.write_text(json.dumps({"en": {"classes": ["a", "b", "c"]}}))
    argv = [str(stage2), "--out", str(tmp_path / "eval.json"), "--prompts", str(prompts)]
    command(*argv, "--tasks", "zeroshot", "--data", str(tmp_path / "classes"))
    command(*argv, "--tasks", "retrieval", "--data", str(tmp_path / "captions"))
    unnamed = [str(stage2), "--data", str(tmp_path / "classes")]
    assert "--prompts FILE" in command(*unnamed, "--tasks", "zeroshot", status=2)
    figures = read_evaluation(tmp_path / "eval.json")
    assert figures["zeroshot_default_en_names"]["accuracy"]["chance"] == pytest.approx(1 / 3)
    # Nine distinct captions, three right for each image; for the last of them all four images.
    assert figures["retrieval_default_en"]["image_to_text_r1"]["chance"] == pytest.approx(3 / 9)
    assert figures["retrieval_default_en"]["text_to_image_r1"]["chance"] == pytest.approx((8 / 4 + 1) / 9)


def test_baseline_is_the_encoder_before_training(command: Callable[..., str], data: DataConfig, tmp_path: Path) -> None:
    run = contrast_run(tmp_path / "run", data, blind=True)
    command(str(run), "--tasks", "knn", "--out", str(tmp_path / "eval.json"))
    figures = read_evaluation(tmp_path / "eval.json")["knn_colors"]
    assert figures["accuracy"]["value"] < 0.7 and figures["accuracy_untrained"]["value"] > 0.9


def test_features_are_those_of_each_image_alone(stage2: Path, data: DataConfig) -> None:
    subject = load_subject(stage2)
    features = image_features(subject.towers.vision, subject.labeled[0], subject.sizing)
    tar = next(Path(data.eval_shards).glob("*.tar"))
    encoded = [member.data for member in read_members(str(tar)) if member.name.endswith(".png")]
    for place, pixels in enumerate(map(read_image, encoded[0::2])):  # sources alternate
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        images = naflex_pack([image], 4, 16, enlarge=False)
        with torch.no_grad():
            alone = pool_mean(subject.towers.vision.forward_packed(images).patch_TD, images.segment(), 1)
        torch.testing.assert_close(features[place], alone[0], atol=1e-5, rtol=1e-5)
    assert place == NUM_HELDOUT - 1


def test_embeddings_are_units_and_ignore_their_neighbors(stage2: Path) -> None:
    subject = load_subject(stage2)
    captions = ["a red picture", "图1", "a much longer caption that is cut at sixteen tokens"]
    together = embed_texts(subject, captions)
    for caption, embedding in zip(captions, together, strict=True):
        torch.testing.assert_close(embed_texts(subject, [caption])[0], embedding, atol=1e-5, rtol=1e-5)
    samples = subject.captioned[0]
    image = embed_images(subject, image_features(subject.towers.vision, samples, subject.sizing))
    for embedded in (together, image):
        torch.testing.assert_close(embedded.norm(dim=1), torch.ones(len(embedded)))


def test_zero_heads_explain_nothing(command: Callable[..., str], stage1: Path, tmp_path: Path) -> None:
    command(str(stage1), "--tasks", "distill", "--out", str(tmp_path / "eval.json"))
    figures = read_evaluation(tmp_path / "eval.json")
    assert figures.keys() == {"distill_siglip2", "distill_dinov3"}
    for metrics in figures.values():
        # Zero is the channel mean over all tokens, not quite over the masked ones.
        assert metrics["explained_all"] == {"value": pytest.approx(0.0, abs=1e-4), "chance": 0.0}
        assert -0.2 < metrics["explained_masked"]["value"] < 0.0


def test_student_that_says_what_the_teacher_says_explains_all(stage1: Path) -> None:
    subject = load_subject(stage1)
    (pack,) = pack_rows(subject.heldout, torch.arange(len(subject.heldout)).numpy(), subject.sizing)
    mask = mask_tokens(pack.images, 0.35)
    vision, head = subject.towers.vision, torch.nn.Linear(32, 5)
    towers = replace(subject.towers, heads={"masked": head, "everywhere": head})
    with torch.no_grad():
        target = {
            "masked": head(vision.forward_packed(pack.images, mask).patch_TD),
            "everywhere": head(vision.forward_packed(pack.images).patch_TD),
        }
    fits = compare(towers, pack, target, 0.35)
    assert fits["masked"].masked.share() == pytest.approx(1.0) and fits["masked"].everywhere.share() < 0.999
    assert fits["everywhere"].everywhere.share() == pytest.approx(1.0) and fits["everywhere"].masked.share() < 0.999
    assert fits["masked"].masked.count == int(mask.sum()) and fits["masked"].everywhere.count == len(mask)


def test_packs_hold_every_image_once_with_equal_grids_side_by_side(
    stage2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = load_subject(stage2)
    rows = torch.arange(len(subject.heldout)).numpy()
    monkeypatch.setattr("cogvit.evaluation.samples._TOKENS_PER_PACK", 40)
    packs = list(pack_rows(subject.heldout, rows, subject.sizing))
    assert len(packs) > 3
    assert sorted(torch.cat([pack.places for pack in packs]).tolist()) == rows.tolist()
    grids = [tuple(grid) for pack in packs for grid in pack.images.grid_hw.tolist()]
    assert sum(a != b for a, b in pairwise(grids)) == len(set(grids)) - 1
    for pack in packs:
        expected = [subject.heldout.ref(int(place)) for place in pack.places]
        assert list(pack.samples) == expected
        assert pack.images.key.tolist() == [ref.sample_id for ref in expected]


def test_rows_are_spread() -> None:
    rows = torch.arange(100, 200).numpy()
    assert spread(rows, 3).tolist() == [100, 149, 199] and spread(rows, 100) is rows


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--tasks", "knn,knm"], ["'knm'", "knn, linear, zeroshot, retrieval, caption, vqa, perplexity, distill"]),
        (["--taks", "knn"], ["--taks", "--tasks"]),
        (["--tasks"], ["--tasks needs a value"]),
        (["--data", "nowhere/*.tar"], ["nowhere/*.tar"]),
        (["--tasks", "distill"], ["no teachers", "stage 1"]),
        (["two", "words"], ["unexpected word 'two'"]),
        (["--out", "config.json"], ["config.json", "does not hold an evaluation"]),
    ],
)
def test_mistakes_are_told_in_one_line(
    command: Callable[..., str], stage2: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], expected: list[str]
) -> None:
    monkeypatch.chdir(stage2)
    message = command(str(stage2), *flags, status=2)
    assert all(word in message for word in expected), message


def test_stage_1_has_no_text_tower(command: Callable[..., str], stage1: Path) -> None:
    assert "no text tower" in command(str(stage1), "--tasks", "knn,zeroshot", status=2)


def test_paths_that_are_no_runs_are_told(command: Callable[..., str], tmp_path: Path) -> None:
    assert "does not exist" in command(str(tmp_path / "nowhere"), status=2)
    assert "export" in command(str(tmp_path), status=2)


def test_sources_without_classes_or_captions_are_told(
    command: Callable[..., str], stage2: Path, tmp_path: Path
) -> None:
    write_tar(tmp_path / "s.tar", members("a", picture(8, 8, seed=0), source="plain"))
    list(build_index(str(tmp_path)))
    assert "label" in command(str(stage2), "--tasks", "knn", "--data", str(tmp_path), status=2)
    assert "captions" in command(str(stage2), "--tasks", "retrieval", "--data", str(tmp_path), status=2)
    assert "needs" in command(str(stage2), "--data", str(tmp_path), status=2)


def test_images_that_do_not_decode_are_named(command: Callable[..., str], stage2: Path, tmp_path: Path) -> None:
    subject, shard = load_subject(stage2), tmp_path / "shard-00000.tar"
    shutil.copy(subject.heldout.corpus.shard_path(0), shard)
    list(build_index(str(tmp_path)))
    stat, rows = shard.stat(), rows_of(subject.heldout, "colors")
    with shard.open("r+b") as file:
        for row in rows[:2].tolist():
            ref = subject.heldout.ref(row)
            file.seek(ref.offset_bytes)
            file.write(bytes(ref.size_bytes))
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the index still fits
    message = command(str(stage2), "--tasks", "retrieval", "--data", str(tmp_path), status=2)
    assert "shard-00000.tar:c0" in message


def test_report_of_both_stages(stage1: Path, stage2: Path, tmp_path: Path) -> None:
    arguments = ReportArguments((str(stage1), str(stage2)), out=str(tmp_path / "report.html"))
    assert report(arguments) == 0
    page = (tmp_path / "report.html").read_text()
    assert "stage1: held-out images" in page and "stage2: held-out images" in page
    assert "图1" in page and "a green picture" in page and "<li class=right>" in page


def test_report_of_a_run_without_heldout_shards(
    stage2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: DataConfig
) -> None:
    run = contrast_run(tmp_path / "run", replace(data, eval_shards=str(tmp_path / "gone" / "*.tar")))
    assert report(ReportArguments((str(run),))) == 0
    assert "gone" in capsys.readouterr().err
    assert "<h2>Pictures" not in (run / "report.html").read_text()
    assert run_command([str(run), "--data", "nowhere"], "usage", ReportArguments, report) == 2


def test_evaluation_needs_neither_trainer_library(stage2: Path) -> None:
    code = (
        "import sys; from cogvit.evaluate import Arguments, evaluate;"
        f"evaluate(Arguments({str(stage2)!r}));"
        "print({'megatron', 'deepspeed', 'ray', 'transformers', 'sklearn', 'wandb'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()"
