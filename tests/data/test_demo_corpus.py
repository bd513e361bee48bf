"""The demo corpus: what is in it, that it is the same every time, and what it refuses to overwrite."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from importlib.metadata import files
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from cogvit.errors import ConfigError
from cogvit.evaluation.prompts import read_prompts
from tools import make_demo_corpus as corpus
from tools.demo_corpus import digits, photos, pictograms

NUM_KEPT = 12  # samples of each shard: enough to see every kind without drawing the whole corpus


def cut_plan(seed: int) -> list[corpus.Shard]:
    return [corpus.Shard(shard.path, islice(shard.samples, NUM_KEPT)) for shard in corpus.shards(seed)]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "demo"
    corpus.make(out, cut_plan(0), seed=0)
    return out


def stored(directory: Path, source: str) -> Iterator[tuple[dict, str, Image.Image]]:
    """Read the shards of a source with webdataset: metadata, caption file and image of every sample."""
    paths = sorted(str(path) for path in directory.rglob(f"{source}-*.tar"))
    assert paths
    for sample in webdataset.WebDataset(paths, shardshuffle=False, empty_check=False):
        image = Image.open(io.BytesIO(sample.get("png") or sample["jpg"]))
        yield json.loads(sample["json"]), sample["txt"].decode(), image


def test_the_font_has_1377_pictograms_with_both_names():
    found = pictograms.pictograms()
    assert len(found) == len({p.character for p in found}) == 1377
    assert len({p.name_en for p in found}) == len({p.name_zh for p in found}) == 1377
    assert pictograms.Pictogram("\U0001f34e", "red apple", "红苹果") in found


def test_every_pictogram_leaves_ink_inside_its_canvas():
    for sample in pictograms.drawings(seed=0, number=0):
        pixels = np.asarray(sample.image).astype(int)
        inked = np.abs(pixels - pixels[0, 0]).max(axis=-1) > 60
        assert 0.005 < inked.mean() < 0.8, sample.caption_en
        assert 20 <= pixels.shape[0] * pixels.shape[1] / 64 <= 30


@pytest.mark.parametrize("source", [pictograms.SOURCE, digits.SOURCE, photos.SOURCE])
def test_samples_read_back_with_sizes_and_captions(built: Path, source: str):
    samples = list(stored(built, source))
    assert len(samples) % NUM_KEPT == 0
    for meta, text, image in samples:
        assert (meta["width"], meta["height"]) == image.size
        assert meta["width"] % 8 == meta["height"] % 8 == 0
        assert meta["source"] == source
        assert [text] == meta["captions"]["en"] and len(meta["captions"]["zh"]) == 1
        assert image.mode == "RGB"


def test_captions_name_the_color_that_was_drawn(built: Path):
    for meta, text, image in stored(built, pictograms.SOURCE):
        _, word, name = text.split(" ", 2)
        color = next(color for color in pictograms.COLORS if color.en == word)
        zh = next(p.name_zh for p in pictograms.pictograms() if p.name_en == name)
        assert meta["captions"]["zh"] == [color.zh + zh]
        pixels = np.asarray(image).reshape(-1, 3).astype(int)
        ink = pixels[np.abs(pixels - pixels[0]).sum(axis=1).argmax()]
        distance = {each.en: np.abs(ink - each.rgb).sum() for each in pictograms.COLORS}
        assert min(distance, key=distance.__getitem__) == word


def test_digits_are_labeled_as_their_captions_say(built: Path):
    for meta, text, _ in stored(built, digits.SOURCE):
        assert text == f"the digit {digits.NAMES_EN[meta['label']]}"
        assert meta["captions"]["zh"] == [f"数字{digits.NAMES_ZH[meta['label']]}"]


def test_held_out_digits_are_other_digits():
    train, heldout = digits.split(seed=0)
    assert len(heldout) == 400
    assert sorted([*train, *heldout]) == list(range(1797))
    assert {digits.drawing(int(i), 0, 0).label for i in heldout} == set(range(10))


def test_held_out_pictograms_are_other_drawings_of_the_same_pictograms():
    by_shard = {shard.path: shard.samples for shard in corpus.shards(seed=0)}
    heldout = {sample.key[:5]: sample for sample in by_shard["heldout/pictograms-00000.tar"]}
    assert len(heldout) == 1377
    for path in (path for path in by_shard if path.startswith("train/pictograms")):
        for sample in islice(by_shard[path], 100):
            other = heldout[sample.key[:5]]
            assert sample.key != other.key
            assert sample.image.tobytes() != other.image.tobytes() or sample.image.size != other.image.size


def test_photographs_come_inside_the_package():
    shipped = {str(path) for path in files("scikit-image") or ()}
    assert all(f"skimage/data/{photo.file}" in shipped for photo in photos.PHOTOS)


def test_equal_seeds_give_equal_bytes(built: Path, tmp_path: Path):
    corpus.make(tmp_path / "again", cut_plan(0), seed=0)
    assert contents(tmp_path / "again") == contents(built)
    corpus.make(tmp_path / "other", cut_plan(1), seed=1)
    first, other = contents(built), contents(tmp_path / "other")
    assert first.keys() == other.keys()
    assert [name for name in first if first[name] == other[name]] == ["digits.json"]


def test_the_digits_are_named_for_a_zeroshot(built: Path):
    english, chinese = (prompts.texts() for _, prompts in sorted(read_prompts(built / "digits.json").items()))
    assert english[0][7] == "seven" and chinese[0][7] == "七" and english[1] == chinese[1] == list(range(10))


def test_contents_list_every_shard(built: Path):
    listed = json.loads((built / "corpus.json").read_text())
    assert set(listed["shards"]) == {str(path.relative_to(built)) for path in built.rglob("*.tar")}
    assert listed["shards"]["heldout/digits-00000.tar"] == NUM_KEPT
    assert listed["sources"].keys() == {"pictograms", "digits", "photos", "questions"}


def test_replaces_its_own_corpus_with_its_indexes(tmp_path: Path):
    out = tmp_path / "demo"
    corpus.make(out, cut_plan(0), seed=0)
    (out / "train" / "digits-00000.tar.parquet").write_bytes(b"index")
    (out / "train" / "corpus-0123456789ab.cogvit").write_bytes(b"index of all")
    corpus.make(out, cut_plan(1), seed=1)
    assert json.loads((out / "corpus.json").read_text())["seed"] == 1
    assert not [*out.rglob("*.parquet"), *out.rglob("*.cogvit")]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("name", ["thesis.tex", "train/extra.tar", "corpus.json"])
def test_refuses_a_directory_that_holds_something_else(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("[1, 2]")
    assert corpus.main(["--out", str(tmp_path)]) == 2
    assert contents(tmp_path) == {name: b"[1, 2]"}
    assert [name in line for line in capfd.readouterr().err.splitlines()] == [True]


def test_refuses_a_file_added_to_a_corpus(built: Path):
    mine = built / "train" / "mine.tar"
    mine.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"train/mine\.tar"):
        corpus.check_replaceable(built)
    mine.unlink()
    corpus.check_replaceable(built)


def test_a_failure_leaves_the_old_corpus(tmp_path: Path):
    out = tmp_path / "demo"
    corpus.make(out, cut_plan(0)[:1], seed=0)
    before = contents(out)
    broken = corpus.Shard("train/photos-00000.tar", (1 // 0 for _ in range(1)))
    with pytest.raises(ZeroDivisionError):
        corpus.make(out, [*cut_plan(1)[:1], broken], seed=1)
    assert contents(out) == before
    assert list(tmp_path.iterdir()) == [out]
