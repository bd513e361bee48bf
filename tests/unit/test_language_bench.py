"""The loop that stage 3 is measured beside trains on the same: padded, its loss is that of our packs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cogvit import CausalLM, CogViT
from cogvit.model.adapter import fitted_adapter
from cogvit.model.vit import grids_of
from tests.conversations import indexed, stage3, write_language_model, write_talks
from tools.bench._padded_loop import BareModel, bare_loss, samples_of
from tools.bench.language import microbatches, read_steps


def test_the_padded_loop_has_the_loss_of_the_packs(tmp_path: Path) -> None:
    indexed(write_talks(tmp_path / "shards"))
    path = write_language_model(tmp_path / "language", "llama", num_hidden_layers=2)
    config = stage3(tmp_path / "shards", path)
    (packs,) = read_steps(config, 1)
    torch.manual_seed(0)
    vision, language = CogViT(config.vision), CausalLM.from_pretrained(path)
    adapter = fitted_adapter(config.adapter, config.vision.embed_dim, language.cfg)
    total, labels = 0.0, 0
    with torch.no_grad():
        for batch in packs:
            sequence, grids = batch.sequence, grids_of(batch.images)
            assert sequence is not None
            visual_ED = adapter.forward_packed(vision.forward_packed(batch.images).patch_TD, grids)
            answer_S = sequence.weight > 0
            logits = language.logits(language.forward_packed(sequence, visual_ED)[answer_S])
            total += float(F.cross_entropy(logits, sequence.labels[answer_S], reduction="sum"))
            labels += int(answer_S.sum())
    samples = [sample for batch in packs for sample in samples_of(batch, config.adapter.spatial_pool)]
    assert len(samples) == config.data.global_batch_images and {len(one.grids) for one in samples} == {0, 1, 2}
    micro = microbatches(samples, 3)
    assert sum(int(batch.valid_BS.sum()) for batch in micro) == sum(len(one.ids) for one in samples)
    assert bare_loss(BareModel(vision, adapter, path), micro) == pytest.approx(total / labels, rel=1e-5)
