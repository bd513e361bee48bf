"""Answers drawn with drafts have the distribution of those drawn without: of draws that are not the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvit import CausalLM
from cogvit.batch import PackedSequence
from cogvit.model.config import MmtpConfig
from cogvit.model.drafting import Drafted
from cogvit.model.generation import Sampling
from cogvit.model.language_config import LanguageConfig
from cogvit.model.sequence import tokens_ahead


def probability_of_chance(one_C: Tensor, other_C: Tensor) -> float:
    """How likely two samples of one distribution, counted by cells, differ by as much: Pearson's chi-square."""
    counts_2C = torch.stack([one_C, other_C]).double()
    expected_2C = counts_2C.sum(1, keepdim=True) * counts_2C.sum(0) / counts_2C.sum()
    rare_C = expected_2C.amin(0) < 5.0
    pooled = [torch.cat([x[:, ~rare_C], x[:, rare_C].sum(1, keepdim=True)], dim=1) for x in (counts_2C, expected_2C)]
    counts, expected = (x[:, pooled[1].amin(0) >= 5.0] for x in pooled)
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(counts.shape[1] - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def walking() -> CausalLM:
    """A model of four tokens and two heads that has begun to learn a walk, one or two steps on by chance."""
    torch.manual_seed(0)
    model = CausalLM(LanguageConfig("llama", 4, 16, 1, 2, 1, 8, 256, mmtp=MmtpConfig(2)))
    ids = (1 + (torch.rand(256) < 0.4)).cumsum(0) % 4
    blank = torch.zeros(256)
    sequence = PackedSequence(
        ids, torch.arange(256).expand(3, -1), torch.tensor([0, 256, 256]), blank.long() - 1, ids.roll(-1), blank + 1.0,
        torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip
    ahead, optimizer = tokens_ahead(sequence, model.cfg.mmtp, ()), torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        hidden = model.forward_packed(sequence)
        deep = model.forward_ahead(hidden, sequence, ahead)
        each = [F.cross_entropy(model.logits(x[:-4]), ids[n : n - 4]) for n, x in enumerate([hidden, *deep], 1)]
        optimizer.zero_grad()
        sum(each).backward()  # type: ignore[union-attr]
        optimizer.step()
    return model


@torch.no_grad()
def test_drawn_answers_with_drafts_are_distributed_as_without() -> None:
    """Of independent draws: the last three of four tokens of four kinds are 64 cells."""
    with torch.enable_grad():
        model = walking()
    ids, drafted, drawn = torch.tensor([[1, 2, 0]]), Drafted(), []
    for row in range(200):
        prompt = model.text_prompt(model.embed_ids(ids[0]), row)
        drawn.append(torch.cat([*model.stream_drafted(prompt, Sampling(4, 1.0), drafted)]))
    alone = model.generate(ids.expand(20_000, -1), 4, temperature=1.0, seed=1)
    other = model.generate(ids.expand(1000, -1), 4, temperature=0.5, seed=2)
    places = torch.tensor([16, 4, 1])
    cells = [(x[:, -3:] * places).sum(1).bincount(minlength=64) for x in (torch.stack(drawn), alone, other)]
    assert 1.2 < drafted.accepted_length < 2.6  # many drafts are kept, many are not
    assert probability_of_chance(cells[0], cells[1]) > 0.01
    assert probability_of_chance(cells[2], cells[1]) < 1e-4  # it tells what is distributed otherwise
