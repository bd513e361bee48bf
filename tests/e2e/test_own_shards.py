"""A user's own shards, as img2dataset writes them, train stage 2 with no code; odd captions and batches included."""

from __future__ import annotations

import io
import json
import math
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertModel

from cogvit import CogViT
from cogvit.config import load_config
from cogvit.evaluate import Arguments as Evaluation
from cogvit.evaluate import evaluate
from cogvit.model.init import init_tensor
from cogvit.train import main
from cogvit.training.checkpoint import folder_of, weights
from cogvit.training.meter import read_metrics
from data_pipeline.index import build_index, load_index
from tests.data.corpus import picture, write_tar
from tests.pool import Pool
from tests.text_encoders import bert, write_encoder
from tools.export import Arguments as Export
from tools.export import export

CAPTIONS = [
    "a photo of something red",
    "",
    "  \n",
    "\u4e00\u53ea\u732b",
    "word " * 20_000,
    "caf\u00e9 \U0001f600",
    "two lines\nof text",
    "x",
]


def write_img2dataset(directory: Path, captions: list[str], shards: int = 2, *, first_seed: int = 0) -> Path:
    """Shards with KEY.jpg, KEY.txt and KEY.json, and beside each shard its table and statistics."""
    for shard in range(shards):
        entries, table = [], []
        for number, caption in enumerate(captions):
            key = f"{shard:05d}{number:04d}"
            metadata: dict[str, Any] = {
                "caption": caption, "url": f"https://example.org/{key}.jpg", "key": key, "status": "success",
                "error_message": None, "width": 40, "height": 24, "original_width": 400, "original_height": 240,
                "exif": "{}", "sha256": "0" * 64,
            }  # fmt: skip
            image = picture(24, 40, seed=first_seed + 100 * shard + number, image_format="JPEG")
            entries += [(f"{key}.jpg", image), (f"{key}.json", json.dumps(metadata).encode())]
            entries += [(f"{key}.txt", caption.encode())]
            table.append(metadata)
        write_tar(directory / f"{shard:05d}.tar", entries)
        pq.write_table(pa.Table.from_pylist(table), directory / f"{shard:05d}.parquet")
        (directory / f"{shard:05d}_stats.json").write_text(
            json.dumps({"count": len(captions), "successes": len(table)})
        )
    for _ in build_index(str(directory)):
        continue
    return directory


def train_on_rank(rank: int, world: int, argv: list[str]) -> int:
    return main(argv)


def flags_of(shards: Path, out: Path) -> list[str]:
    """Two steps of the demo's stage 2 with small packs."""
    argv = ["demo_stage2", "--data.shards", str(shards), "--out", str(out), "--schedule.steps", "2"]
    argv += ["--eval.every-steps", "0", "--data.held-out", "0", "--log.wandb", "off", "--data.tokens-per-pack", "256"]
    return [*argv, "--data.images-per-pack", "8", "--data.text-tokens-per-pack", "256"]


def train(pool: Pool, world: int, shards: Path, out: Path, *flags: str) -> list[dict[str, float]]:
    """Train two steps; returns the lines of metrics.jsonl."""
    argv = [*flags_of(shards, out), *flags]
    assert pool.run(train_on_rank, world, (argv,), timeout_s=100.0) == [0] * world
    return read_metrics(out / "metrics.jsonl")


def test_shards_of_img2dataset_train_with_any_caption(pool: Pool, tmp_path: Path) -> None:
    shards = write_img2dataset(tmp_path / "shards", CAPTIONS)
    captioned = load_index(str(shards)).captioned()
    assert len(captioned) == 2 * sum(bool(caption.strip()) for caption in CAPTIONS)
    whole = ["--data.global-batch-images", str(len(captioned)), "--data.lookahead-steps", "1"]
    lines = train(pool, 2, shards, tmp_path / "run", *whole)
    # Each step holds every sample with a caption once; the one of 100,000 characters is cut, which is reported.
    assert [line["images"] for line in lines] == [len(captioned)] * 2
    assert [line["cut_captions"] for line in lines] == [2] * 2
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0.0 for line in lines)


@pytest.mark.parametrize("pairs", [1, 6])
def test_batches_without_a_negative(pool: Pool, tmp_path: Path, pairs: int) -> None:
    """One pair, or equal captions everywhere: only the positives count, so the loss is that of each alone."""
    shards = write_img2dataset(tmp_path / "shards", ["the same"] * 3)
    start = ["--init-log-t", "0", "--init-bias", "-5", "--data.global-batch-images", str(pairs)]
    lines = train(pool, 1, shards, tmp_path / "run", *start)
    assert [line["images"] for line in lines] == [pairs] * 2
    # -log sigmoid(cos - 5): between the cosines of 1 and -1; a single negative would add next to nothing.
    assert math.log1p(math.exp(4.0)) - 1e-3 <= lines[0]["loss"] <= math.log1p(math.exp(6.0)) + 1e-3


def refusal(rank: int, world: int, argv: list[str]) -> tuple[int, str]:
    printed = io.StringIO()
    with redirect_stderr(printed):
        status = main(argv)
    return status, printed.getvalue()


def test_locked_image_tuning_at_several_resolutions(pool: Pool, tmp_path: Path) -> None:
    shards = write_img2dataset(tmp_path / "shards", ["red", "green", "blue"])
    flags = ["--data.global-batch-images", "6", "--data.lookahead-steps", "1", "--data.enlarge"]
    flags += ["--data.max-patches", "32", "--data.budgets-patches", "[4, 32]", "--optim.vision.lr-mult", "0"]
    lines = train(pool, 1, shards, tmp_path / "run", *flags)
    # 24 x 40 pixels take 2 x 2 or 4 x 7 patches: the six images of a step are neither all small nor all large.
    assert all(6 * 4 < line["tokens"] < 6 * 28 for line in lines)
    config = load_config(tmp_path / "run" / "config.json")
    trained = weights(folder_of(tmp_path / "run") / "step_00000002", "")
    for name, tensor in trained.items():
        start = init_tensor(name, tuple(tensor.shape), config.seed, 1.0)
        if name.startswith("vision."):
            assert torch.equal(tensor, start), name
        elif name.endswith("proj.weight"):
            assert not torch.equal(tensor, start), name
    assert all(line["grad_norm_vision"] == 0.0 < line["grad_norm_text"] for line in lines)


def evaluate_on_rank(rank: int, world: int, run: Path, data: Path, out: Path) -> int:
    return evaluate(Evaluation(str(run), tasks="retrieval", data=str(data), out=str(out)))


def test_a_text_encoder_of_transformers_locked_and_free(pool: Pool, tmp_path: Path) -> None:
    """Train, resume, evaluate and export; locked, it still teaches its projection and the images."""
    shards, encoder = write_img2dataset(tmp_path / "shards", CAPTIONS), write_encoder(tmp_path, bert)
    flags = ["--text-encoder.path", str(encoder), "--text.max-tokens", "24", "--data.global-batch-images", "12"]
    locked = train(pool, 2, shards, tmp_path / "locked", *flags, "--optim.text.lr-mult", "0")
    free = train(pool, 1, shards, tmp_path / "free", *flags)
    assert locked[0]["loss"] == pytest.approx(free[0]["loss"], rel=1e-5)
    assert locked[0]["grad_norm_text"] == 0.0 < free[0]["grad_norm_text"]
    start = dict(BertModel.from_pretrained(encoder).named_parameters())
    for name, changes in (("locked", False), ("free", True)):
        config = load_config(tmp_path / name / "config.json")
        assert (config.text.vocab_size, config.text.embed_dim, config.text.depth) == (384, 32, 2)
        found = weights(folder_of(tmp_path / name) / "step_00000002", "text.encoder.")
        assert found.keys() == {key for key in start if not key.startswith("pooler.")}
        assert all(torch.equal(found[key], start[key]) for key in found) != changes
    more = train(pool, 1, shards, tmp_path / "locked", *flags, "--optim.text.lr-mult", "0", "--schedule.steps", "2")
    assert [line["step"] for line in more] == [1, 2]  # it had come to its end
    heldout = write_img2dataset(tmp_path / "heldout", ["red", "green", "blue"], first_seed=1000)
    assert pool.run(evaluate_on_rank, 1, (tmp_path / "free", heldout, tmp_path / "eval.json"), timeout_s=100.0) == [0]
    (figures,) = json.loads((tmp_path / "eval.json").read_text()).values()
    assert figures["image_to_text_r1"]["chance"] == pytest.approx(1 / 3)
    assert export(Export(str(tmp_path / "free"), str(tmp_path / "export"))) == 0
    assert CogViT.from_pretrained(tmp_path / "export").cfg == load_config(tmp_path / "free" / "config.json").vision


def test_an_encoder_that_does_not_fit_is_one_line(pool: Pool, tmp_path: Path) -> None:
    shards, encoder = write_img2dataset(tmp_path / "shards", ["one", "two"]), write_encoder(tmp_path, bert)
    argv = ["demo_stage2", "--data.shards", str(shards), "--out", str(tmp_path / "run"), "--eval.every-steps", "0"]
    status, printed = pool.run(refusal, 1, ([*argv, "--text-encoder.path", str(encoder)],))[0]
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and "--text.max-tokens 48" in errors[0]
