"""Evaluation on several ranks: the figures of one process, each image decoded once, errors told once."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from cogvit import evaluate as command
from cogvit.config.arguments import run_command
from cogvit.evaluate import Arguments
from cogvit.evaluation import features, samples
from cogvit.evaluation.ranks import Ranks
from cogvit.evaluation.results import read_evaluation
from data_pipeline.index import build_index, load_index
from tests.pool import Pool
from tests.runs_on_disk import contrast_run, write_shards


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluation")
    return contrast_run(directory / "stage2", write_shards(directory / "data"))


def evaluate_on_rank(rank: int, world: int, argv: list[str]) -> tuple[int, str, str, int]:
    """Status, what was printed, and how many images this rank decoded, in packs of a few images."""
    samples._TOKENS_PER_PACK, features._CAPTIONS_PER_BATCH = 40, 2
    decoded, decode = [], samples.decode_patches

    def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
        decoded.append(rank)
        return decode(*args, **kwargs)

    samples.decode_patches = counted
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = run_command(argv, command.__doc__ or "", Arguments, command.evaluate)
    return status, out.getvalue(), err.getvalue(), len(decoded)


def test_several_ranks_find_the_figures_of_one(pool: Pool, run: Path, tmp_path: Path) -> None:
    ((_, table, _, alone),) = pool.run(evaluate_on_rank, 1, ([str(run), "--out", str(tmp_path / "1.json")],))
    answers = pool.run(evaluate_on_rank, 3, ([str(run), "--out", str(tmp_path / "3.json")],))
    assert [status for status, *_ in answers] == [0, 0, 0]
    assert read_evaluation(tmp_path / "3.json") == read_evaluation(tmp_path / "1.json")
    assert "retrieval_colors_zh" in table and [printed for _, printed, *_ in answers] == [table, "", ""]
    assert answers[0][2] and not answers[1][2] and not answers[2][2]
    decoded = [count for *_, count in answers]
    assert sum(decoded) == alone and max(decoded) <= 0.5 * alone


def test_an_error_of_one_rank_is_everybodys(pool: Pool, run: Path, tmp_path: Path) -> None:
    whole = next((run.parent / "data" / "heldout").glob("*.tar"))
    shard = tmp_path / whole.name
    shard.write_bytes(whole.read_bytes())
    list(build_index(str(tmp_path)))
    stat, index = shard.stat(), load_index(str(tmp_path))
    with shard.open("r+b") as file:
        for ref in (index.ref(0), index.ref(2)):  # two of a source's nine: one alone is left out and counted
            file.seek(ref.offset_bytes)
            file.write(bytes(ref.size_bytes))
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the index still fits
    answers = pool.run(evaluate_on_rank, 2, ([str(run), "--tasks", "retrieval", "--data", str(tmp_path)],))
    assert [status for status, *_ in answers] == [2, 2]
    errors = [line for _, _, printed, _ in answers for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and ":c0" in errors[0]


def test_more_ranks_than_batches() -> None:
    dealt = [list(Ranks(rank, 4).mine(range(3))) for rank in range(4)]
    assert dealt == [[0], [1], [2], []]
    assert torch.equal(Ranks().whole(lambda: torch.ones(2)), torch.ones(2))
