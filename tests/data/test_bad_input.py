"""Whatever foreign shards hold: left out and counted when they are indexed, or of weight 0; no crash, no silence."""

import io
import json
import tarfile
import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogvit.errors import DataError
from data_pipeline.decode import MAX_PIXELS, read_header
from data_pipeline.index import load_index
from data_pipeline.loader import step_batches
from tests.data.corpus import keys_of, members, picture, run_config, table_of
from tests.data.test_decode import bomb, encoded
from tests.data.test_loader import refs, seat_of, take
from tools.index_shards import main


def odd_but_sound():
    """Encoded images of unusual kinds, by the name of the kind."""
    rgb = Image.new("RGB", (24, 16), (200, 40, 90))
    rotated = Image.Exif()
    rotated[0x112] = 6
    frames = [Image.new("RGB", (24, 16), color) for color in ("red", "blue")]
    return {
        "cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "gray16": encoded(Image.fromarray(np.full((16, 24), 40_000, np.uint16)), "PNG"),
        "palette": encoded(rgb.convert("P"), "PNG"),
        "alpha": encoded(rgb.convert("RGBA"), "PNG"),
        "animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "rotated": encoded(rgb, "JPEG", exif=rotated.tobytes()),
    }


def write_zoo(directory: Path) -> Path:
    """One shard of everything: 8 sound images, 6 odd ones, 2 whose pixels are damaged, and what must be left out."""
    entries = [one for number in range(8) for one in members(f"good{number}", picture(16, 24, number), caption="fine")]
    for name, image in odd_but_sound().items():
        entries += members(name, image, caption=name)
    whole = picture(200, 200, 30, "JPEG", quality=95)
    entries += members("jpeg_half", whole[: len(whole) * 3 // 4], "jpg", caption="half")
    entries += members("jpeg_header", whole[:300], "jpg", caption="header")
    entries += members("png_cut", picture(64, 64, 31)[:90], caption="cut")
    for name, image in {
        "empty": b"",
        "bomb": bomb(),
        "sliver": picture(1, 30_000, 32),
        "banner": picture(9, 300, 33),
    }.items():
        entries += members(name, image, caption=name)
    entries += [("latin.png", picture(16, 24, 40)), ("latin.txt", b"caf\xe9")]
    entries += [("broken.png", picture(16, 24, 41)), ("broken.json", b"{")]
    entries += [("blank.png", picture(16, 24, 42)), ("blank.txt", b" \n")]
    entries += [("mute.png", picture(16, 24, 43))]
    entries += [("good0.jpg", picture(16, 24, 44, "JPEG")), ("good1.json", json.dumps({"caption": "other"}).encode())]
    entries += members("../../etc/passwd", picture(16, 24, 45), caption="up")
    entries += members("/absolute", picture(16, 24, 46), caption="root")
    directory.mkdir()
    with tarfile.open(directory / "zoo.tar", "w") as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)):
            info = tarfile.TarInfo(f"link{number}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("folder")
        info.type = tarfile.DIRTYPE
        archive.addfile(info)
    return directory


@pytest.fixture
def zoo(tmp_path, capsys):
    """The shard's index, and what the command printed."""
    directory = write_zoo(tmp_path / "zoo")
    assert main([str(directory)]) == 0
    return load_index(str(directory), duplicates="drop"), capsys.readouterr().out


def test_everything_is_indexed_or_counted(zoo):
    index, printed = zoo
    found = set(keys_of(index))
    assert found >= odd_but_sound().keys() | {"jpeg_half", "png_cut", "latin", "broken", "blank", "mute"}
    assert found >= {"../../etc/passwd", "/absolute"}
    assert not found & {"empty", "jpeg_header", "bomb", "sliver", "banner", "link0", "link1", "link2", "link3"}
    counted = {
        "no known image format, or a damaged header": 1,
        "the header does not parse": 1,
        "more than 89,478,485 pixels, as a decompression bomb has; shrink the image": 1,
        "a side is shorter than 8 px": 1,
        "the aspect ratio is beyond 6": 1,
        "a caption is not UTF-8: unexpected end of data": 1,
        "a second image of the same key": 1,
        "a second json, txt or cls of the same key": 1,
        "a link, device or sparse file, which is not followed": 4,
        "a sample's captions are empty or missing in its json or txt (it serves stage 1)": 3,
        "captions without an image": 5,  # of those whose image was left out
    }
    for reason, count in counted.items():
        assert f"left out: {count} x {reason}\n" in printed, printed
    assert printed.count("left out: 1 x a sample's json does not parse") == 1
    # Keys that look like paths are names and nothing else.
    assert not Path("/absolute.png").exists()
    rotated = table_of(index)[keys_of(index).index("rotated")]
    assert (rotated["height_px"], rotated["width_px"]) == (24, 16)


def test_damaged_pixels_weigh_nothing_and_everything_else_trains(zoo):
    index, _ = zoo
    config = run_config(global_batch_images=len(index), lookahead_steps=1, max_patches=24, images_per_pack=12)
    (step,) = take(index, config, 1, reads="images")
    assert len(refs(step)) == step.decoded == len(index)
    weight = {
        sample.sample_id: float(micro.images.weight[slot])
        for micro in step.micro
        for slot, sample in enumerate(micro.samples)
        if sample is not None
    }
    names = dict(zip(table_of(index)["sample_id"].tolist(), keys_of(index), strict=True))
    assert {names[sample] for sample, one in weight.items() if one == 0.0} == {"jpeg_half", "png_cut"}
    assert sorted(failure.partition(" ")[0].rpartition(":")[2] for failure in step.failures) == [
        "jpeg_half", "png_cut",
    ]  # fmt: skip
    strict = run_config(global_batch_images=len(index), lookahead_steps=1, max_bad_fraction=0.001, max_patches=24)
    with pytest.raises(DataError, match=r"2 of \d+ images did not decode.*data\.max_bad_fraction=0\.001"):
        take(index, strict, 1, reads="images")


def test_samples_without_a_caption_are_counted_where_captions_are_needed(zoo):
    index, _ = zoo
    assert "left out: 4 x no caption" in index.captioned().describe()
    assert "no caption" not in index.describe()
    assert len(index) - len(index.captioned()) == 4


def test_a_bomb_is_refused_before_it_is_decoded():
    tracemalloc.start()
    with pytest.raises(DataError, match="decompression bomb"):
        read_header(bomb())
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2**20 < MAX_PIXELS


@pytest.mark.parametrize("shape", [(1, 30_000), (30_000, 1)])
def test_a_sliver_trains_where_the_rules_let_it(tmp_path, shape):
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "s.tar", "w") as archive:
        for number in range(4):
            data = picture(*shape, number)
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert main([str(tmp_path / "shards"), "--min-side-px", "1", "--max-aspect", "1e9"]) == 0
    config = run_config(global_batch_images=4, lookahead_steps=1, crop=0.2, flip=True)
    (step,) = take(load_index(str(tmp_path / "shards")), config, 1, reads="images")
    grids = [tuple(micro.images.grid_hw[slot].tolist()) for micro in step.micro for slot in range(4)]
    assert {grid for grid in grids if grid != (0, 0)} == {(1, 20) if shape[0] == 1 else (20, 1)}
    assert sum(float(micro.images.weight.sum()) for micro in step.micro) == 4.0


@pytest.mark.parametrize("how", ["vanishes", "is cut", "is replaced"])
def test_a_shard_that_changes_between_two_steps_stops_the_run_by_name(tmp_path, monkeypatch, how):
    """One file stays open at a time, as where there are more shards than a process may hold."""
    monkeypatch.setattr("data_pipeline.shards.MAX_OPEN_SHARDS", 1)
    directory = tmp_path / "shards"
    directory.mkdir()
    for shard in range(2):
        with tarfile.open(directory / f"{shard}.tar", "w") as archive:
            for number in range(8):
                data = picture(16, 16, 10 * shard + number)
                info = tarfile.TarInfo(f"{number}.png")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    assert main([str(directory)]) == 0
    config = run_config(global_batch_images=4, lookahead_steps=1, prefetch_steps=1)
    batches = step_batches(load_index(str(directory)), config, seat_of(config), None, reads="images")
    next(batches)
    for path in directory.glob("*.tar"):
        if how == "vanishes":
            path.unlink()
        elif how == "is cut":
            path.write_bytes(path.read_bytes()[:1000])
        else:
            path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(DataError, match=r"\d\.tar(: No such file| ends before byte| changed after it was indexed)"):
        list(islice(batches, 5))
    batches.close()
