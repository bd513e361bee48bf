"""Figures that can be compared: nothing seen in training, other programs' recall, damaged images, missing captions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogvit.batch import PackedImages
from cogvit.config import DataConfig
from cogvit.config.arguments import run_command
from cogvit.evaluate import Arguments, evaluate
from cogvit.evaluation.metrics import explain, linear_accuracy
from cogvit.evaluation.places import place_sums
from cogvit.model.packing import pack_images
from data_pipeline.index import build_index
from tests.data.corpus import members, picture, write_tar
from tests.runs_on_disk import COLORS, contrast_run, tinted, write_shards


def figures(argv: list[str], out: Path) -> dict[str, dict[str, dict[str, float]]]:
    assert run_command([*argv, "--out", str(out)], "", Arguments, evaluate) == 0
    return json.loads(out.read_text())


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return write_shards(tmp_path / "data")


def test_training_images_among_the_held_out_ones_do_not_count(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = contrast_run(tmp_path / "run", data)
    assert run_command([str(run), "--data", data.shards], "", Arguments, evaluate) == 2
    assert "every held-out image is a training image too" in capsys.readouterr().err
    entries = [("old.png", tinted(12, 16, 100, 0)), ("old.json", json.dumps({"source": "colors", "label": 0}).encode())]
    for number in range(6):
        color = number % len(COLORS)
        entries += members(f"n{number}", tinted(12, 16, 900 + number, color), source="colors", label=color)
    write_tar(tmp_path / "mixed" / "shard-00000.tar", entries)
    list(build_index(str(tmp_path / "mixed")))
    found = figures([str(run), "--data", str(tmp_path / "mixed"), "--tasks", "knn"], tmp_path / "out.json")
    assert "1 of 7 held-out colors are training images too: left out" in capsys.readouterr().err
    assert found["knn_colors"]["accuracy"]["value"] in [n / 6 for n in range(7)]


def test_all_training_images_are_learned_from_unless_a_number_says_otherwise(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = contrast_run(tmp_path / "run", data)
    figures([str(run), "--tasks", "knn"], tmp_path / "a.json")
    assert "knn: 9 training and 9 held-out colors" in capsys.readouterr().err
    figures([str(run), "--tasks", "knn", "--train-images", "4"], tmp_path / "a.json")
    assert "knn: 4 training and 9 held-out colors" in capsys.readouterr().err
    assert run_command([str(run), "--train-images", "0"], "", Arguments, evaluate) == 2


def test_recall_is_counted_as_others_do_too_and_over_all_sources(data: DataConfig, tmp_path: Path) -> None:
    found = figures([str(contrast_run(tmp_path / "run", data)), "--tasks", "retrieval"], tmp_path / "out.json")
    own, usual = (found["retrieval_colors_en"][f"image_to_text_r1{suffix}"] for suffix in ("", "_usual"))
    # Nine images with three captions, each three times: any of the three is right for us, its own alone for others.
    assert own["chance"] == pytest.approx(1 / 3) and usual["chance"] == pytest.approx(1 / 9)
    assert found["retrieval_colors_en"]["text_to_image_r10_usual"]["value"] == 1.0
    assert {"retrieval_colors_zh", "retrieval_things_en", "retrieval_all_en"} <= found.keys()
    assert "retrieval_all_zh" not in found  # things have no Chinese captions
    assert found["retrieval_all_en"]["image_to_text_r1_usual"]["chance"] == pytest.approx(1 / 18)


def test_what_colors_alone_find_stands_beside_a_retrieval(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pictures of `colors` differ in color alone, so that this baseline finds all of them."""
    run = str(contrast_run(tmp_path / "run", data))
    found = figures([run, "--tasks", "retrieval"], tmp_path / "out.json")["retrieval_colors_en"]
    assert found["image_to_text_r1_color"]["value"] == found["text_to_image_r1_color"]["value"] == 1.0
    assert found["image_to_text_r1_color"]["chance"] == found["image_to_text_r1"]["chance"]
    assert found["captions_of_training_images"]["value"] == 1.0
    assert "100% of the captions are of training images too: new images of what these show" in capsys.readouterr().err
    other = many(tmp_path / "other", damaged=0)  # captions that no training image has
    found = figures([run, "--tasks", "retrieval", "--data", str(other)], tmp_path / "other.json")["retrieval_colors_en"]
    assert found["captions_of_training_images"]["value"] == 0.0


def test_zeroshot_goes_by_names_and_says_what_the_captions_would_give(data: DataConfig, tmp_path: Path) -> None:
    run, names = str(contrast_run(tmp_path / "run", data)), tmp_path / "names.json"
    names.write_text(json.dumps({"en": {"classes": ["ruby", "leaf", "sky"], "templates": ["{}"]}}))
    found = figures([run, "--tasks", "zeroshot", "--prompts", str(names)], tmp_path / "out.json")
    assert list(found) == ["zeroshot_colors_en", "zeroshot_colors_zh", "zeroshot_colors_en_names"]
    alone = figures([run, "--tasks", "zeroshot"], tmp_path / "alone.json")
    assert alone == {name: figure for name, figure in found.items() if not name.endswith("_names")}


def many(directory: Path, damaged: int, captions: int = 150) -> Path:
    entries = []
    for number in range(150):
        image = tinted(12, 16, 2000 + number, number % 3)
        image = image[:60] + b"\0" * (len(image) - 60) if number < damaged else image
        text = {"en": ["a picture"], "zh": ["图"]} if number < captions else {"en": ["a picture"]}
        entries += members(f"{number:03d}", image, source="colors", label=number % 3, captions=text)
    write_tar(directory / "shard-00000.tar", entries)
    list(build_index(str(directory)))
    return directory


def test_a_damaged_image_is_skipped_counted_and_many_are_refused(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(contrast_run(tmp_path / "run", data))
    few = many(tmp_path / "few", damaged=1)
    found = figures([run, "--data", str(few), "--tasks", "knn,linear,zeroshot,retrieval"], tmp_path / "out.json")
    assert "1 of 150 colors do not decode: left out" in capsys.readouterr().err
    assert found["knn_colors"]["accuracy"]["value"] * 149 == pytest.approx(
        round(found["knn_colors"]["accuracy"]["value"] * 149)
    )
    assert run_command([run, "--data", str(many(tmp_path / "lots", 9)), "--tasks", "knn"], "", Arguments, evaluate) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "9 of 150 images of colors do not decode" in told and "shard-00000.tar:000" in told


def test_a_set_of_which_nothing_is_left_is_told_in_its_own_words(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(contrast_run(tmp_path / "run", data))
    one = tinted(12, 16, 3000, 0)
    said = {"source": "colors", "label": 0, "captions": {"en": ["a picture"]}}
    entries = [("a.png", one[:60] + b"\0" * (len(one) - 60)), ("a.json", json.dumps(said).encode())]
    write_tar(tmp_path / "one" / "shard-00000.tar", entries)
    list(build_index(str(tmp_path / "one")))
    for task in ("knn", "zeroshot", "retrieval"):
        argv = [run, "--data", str(tmp_path / "one"), "--tasks", task]
        assert run_command(argv, "", Arguments, evaluate) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert "1 of 1 images of colors do not decode" in told and "which is all of them" in told
    seen = members("c", tinted(12, 16, 100, 0), source="colors", label=0)
    seen += members("t", picture(20, 12, 4000), source="things", captions={"en": ["a thing"]})
    write_tar(tmp_path / "seen" / "shard-00000.tar", seen)
    list(build_index(str(tmp_path / "seen")))
    assert run_command([run, "--data", str(tmp_path / "seen"), "--tasks", "knn"], "", Arguments, evaluate) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "(left out, because all of their images are training images: colors); pass another --data" in told


def test_a_caption_that_is_missing_in_a_language_is_named(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(contrast_run(tmp_path / "run", data))
    part = many(tmp_path / "part", damaged=0, captions=148)
    figures([run, "--data", str(part), "--tasks", "retrieval"], tmp_path / "out.json")
    told = capsys.readouterr().err
    assert "2 of 150 colors have no caption in zh" in told and "shard-00000.tar:148 first" in told


def test_the_penalty_of_the_probe_is_chosen_without_the_test_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(240) % 3
    train = torch.randn(240, 200, generator=generator)
    train[:, :3] += 1.5 * torch.nn.functional.one_hot(label, 3)
    test_label = torch.arange(300) % 3
    test = torch.randn(300, 200, generator=generator)
    test[:, :3] += 1.5 * torch.nn.functional.one_hot(test_label, 3)
    accuracy = linear_accuracy(train, label, test, test_label)
    assert accuracy > 0.5
    assert accuracy == linear_accuracy(train, label, test, test_label)


def test_a_place_explains_what_is_a_function_of_it_alone() -> None:
    torch.manual_seed(0)
    grids = [(4, 6), (6, 4), (5, 5), (4, 4)] * 4
    images: PackedImages = pack_images(
        [torch.zeros(rows * columns, 12) for rows, columns in grids], grids, key_N=torch.arange(len(grids))
    )
    everywhere = torch.ones(images.num_tokens, dtype=torch.bool)
    slot = images.segment()
    place = (images.row_col * 8) // images.grid_hw[slot]
    of_place = torch.randn(8, 8, 5)[place[:, 0].long(), place[:, 1].long()]
    two = place_sums(of_place, replace(images, key=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1] * 2)), everywhere)
    assert two.share() == pytest.approx(1.0, abs=1e-9)
    noise = torch.randn(images.num_tokens, 5)
    assert place_sums(noise, images, everywhere).share() < 0.1
    assert explain(noise, torch.zeros_like(noise)).share() == pytest.approx(0.0, abs=0.01)
