"""A language model of a family that ours does not build trains whole on the last stage, as transformers alone would."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cogvit import AdapterConfig, CogViT, PretrainedLanguage, VisionLanguageModel
from cogvit.batch import Batch
from cogvit.config import ActivationConfig
from cogvit.errors import CheckpointError, ConfigError
from cogvit.model.adapter import fitted_adapter
from cogvit.model.generation import Sampling
from cogvit.model.language import place_visual, rows_of, text_positions
from cogvit.model.language_config import LanguageShape, check_layout
from cogvit.model.pretrained_language import language_shape
from cogvit.model.vit import grids_of
from cogvit.objective.language import JointModel, JointPart, Language
from cogvit.parallel.convert import fill
from cogvit.parallel.encoder import VisionStage
from cogvit.parallel.mesh import start_mesh
from cogvit.parallel.whole import WholeLanguageStage
from cogvit.stages.cost import language_load
from cogvit.training.engine import Engine
from tests.conversations import stage3, write_language_model
from tests.dist.runs import whole
from tests.language import conversation, other_language, picture, tiny_tokenizer, token_ids
from tests.packs import joint_batch
from tests.parity.test_language_trunk import SHOWN, VISION, Layout, run_config
from tests.plain_vit import scramble
from tests.pool import Pool

ADAPTER = AdapterConfig("swiglu")


@dataclass(frozen=True)
class Found:
    """What a step of a layout gave, and what autograd gives of every sample read by transformers alone; on rank 0."""

    loss: float
    evaluated: float
    expected_loss: float
    gradients: dict[str, Tensor]
    expected: dict[str, Tensor]


def encoder_and_adapter(shape: LanguageShape) -> nn.ModuleDict:
    """The same weights in every process."""
    parts = nn.ModuleDict({"vision": CogViT(VISION), "adapter": fitted_adapter(ADAPTER, VISION.embed_dim, shape)})
    scramble(parts)
    with torch.no_grad():
        for parameter in parts.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.4)
    return parts


def loss_sample_by_sample(parts: nn.ModuleDict, model: PreTrainedModel, micro: Sequence[Batch]) -> Tensor:
    """The weighted mean of all labels' cross entropy; transformers sees one sample at a time."""
    total, weights = torch.zeros(()), torch.zeros(())
    for batch in micro:
        sequence = batch.sequence
        assert sequence is not None
        visual_ED = parts["adapter"].forward_packed(
            parts["vision"].forward_packed(batch.images).patch_TD, grids_of(batch.images)
        )
        x_SD = place_visual(model.get_input_embeddings()(sequence.ids), visual_ED, sequence.visual_row)
        for start, stop in pairwise(sequence.cu_seqlens[:-1].tolist()):
            if stop > start:
                logits = model(inputs_embeds=x_SD[start:stop].unsqueeze(0)).logits[0]
                errors = F.cross_entropy(logits, sequence.labels[start:stop], reduction="none")
                total = total + (errors * sequence.weight[start:stop]).sum()
        weights = weights + sequence.weight.sum()
    return total / weights


def both_ways(rank: int, world: int, layout: Layout, cases: Sequence[tuple[str, tuple[JointPart, ...]]]) -> list[Found]:
    """A step of each model on this layout and of transformers."""
    config = run_config(layout)
    mesh, found = start_mesh(config.parallel), []
    for directory, frozen in cases:
        batches = [joint_batch(seed, shown, by_place=False) for seed, shown in enumerate(SHOWN)]
        share = len(batches) // mesh.dp_size
        micro = batches[mesh.dp_rank * share : (mesh.dp_rank + 1) * share]
        shape = language_shape(Path(directory))
        read = PretrainedLanguage.from_pretrained(directory) if mesh.is_last_stage else None
        language = WholeLanguageStage(shape, mesh, read)
        vision = VisionStage(VISION, mesh, config.parallel, ActivationConfig(), num_tokens=96, num_slots=8)
        model = JointModel(vision, ADAPTER, language, frozen)
        parts, plain = encoder_and_adapter(shape), AutoModelForCausalLM.from_pretrained(directory)
        named = {**dict(parts.named_parameters()), **{f"language.model.{n}": p for n, p in plain.named_parameters()}}
        fill(model, mesh, lambda name, shape, given=named: given[name].detach())
        engine = Engine(model, config, mesh)
        evaluated = engine.evaluate(Language(), micro)["loss"]
        gradients = whole(engine.plain_gradients(Language(), micro), mesh)
        loss = loss_sample_by_sample(parts, plain, batches)
        loss.backward()
        expected = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
        expected = {name: gradient for name, gradient in expected.items() if name.split(".")[0] not in frozen}
        terms = engine.step(Language(), micro, 0).terms
        assert all(p.grad is None for name, p in model.named_parameters() if name.split(".")[0] in frozen)
        found.append(Found(terms["loss"], evaluated, float(loss.detach()), gradients, expected))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories; Gemma 2 has windows shorter than samples, a capped and tied head, and one head of keys for two."""
    directory = tmp_path_factory.mktemp("language")
    return {
        family: str(write_language_model(directory / family, family, num_hidden_layers=2))
        for family in ("gpt_neox", "gemma2")
    }


ROWS: list[tuple[Layout, list[tuple[str, tuple[JointPart, ...]]]]] = [
    (Layout(), [("gpt_neox", ()), ("gemma2", ("vision",))]),
    (Layout(dp=2, zero=2), [("gpt_neox", ("language",)), ("gemma2", ())]),
    (Layout(pp=2), [("gpt_neox", ()), ("gemma2", ("vision",)), ("gpt_neox", ("language",))]),
]


@pytest.mark.parametrize(
    ("layout", "cases"),
    [pytest.param(*row, marks=() if row[0].pp > 1 else pytest.mark.long, id=str(row[0])) for row in ROWS],
)
def test_a_step_is_that_of_transformers_sample_by_sample(
    pool: Pool, models: dict[str, str], layout: Layout, cases: list[tuple[str, tuple[JointPart, ...]]]
) -> None:
    placed = [(models[family], frozen) for family, frozen in cases]
    for found in pool.run(both_ways, layout.dp * layout.pp, (layout, placed))[0]:
        assert found.loss == pytest.approx(found.expected_loss, rel=1e-5)
        assert found.evaluated == pytest.approx(found.expected_loss, rel=1e-5)
        assert found.gradients.keys() == found.expected.keys()
        for name, gradient in found.expected.items():
            error = (found.gradients[name] - gradient).norm()
            assert error <= max(1e-6, 1e-5 * float(gradient.norm())), f"{name}: {error} of {gradient.norm()}"
            assert gradient.any() or name == "vision.mask_token", name


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "granite", "cohere"])
def test_answers_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    theirs = other_language(family)
    theirs.save_pretrained(tmp_path)
    ours = PretrainedLanguage.from_pretrained(tmp_path)
    prompts = token_ids(2, 13)
    assert torch.equal(ours(prompts), theirs(prompts).logits)
    expected = theirs.generate(prompts, max_new_tokens=9, do_sample=False)[:, 13:]
    x_SD, batch = ours.embed_ids(prompts.flatten()), prompts.shape
    stream = ours.stream(x_SD, text_positions(batch, x_SD.device), rows_of(batch, x_SD.device), Sampling(9))
    assert torch.equal(torch.stack(list(stream), dim=1), expected)


def test_a_model_of_any_family_is_saved_and_answers_as_before(tmp_path: Path) -> None:
    language = PretrainedLanguage.from_pretrained(write_language_model(tmp_path / "source", "gpt_neox"))
    model = VisionLanguageModel.joined(CogViT(VISION), language, tiny_tokenizer(), ADAPTER, 16 * 16, 64 * 64)
    scramble(model)
    asked = conversation(picture(30, 41))
    model.save_pretrained(tmp_path / "saved")
    again = VisionLanguageModel.from_pretrained(tmp_path / "saved")
    assert again.generate(asked, 6) == model.eval().generate(asked, 6) != ""
    with torch.no_grad():
        for name, parameter in AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "language").named_parameters():
            assert torch.equal(parameter, model.language.get_parameter(f"model.{name}"))
    with pytest.raises(CheckpointError, match="cannot hold an adapter of kind swiglu"):
        model.save_glm_ocr_full(tmp_path / "glm")


@pytest.mark.parametrize("family", ["bloom", "bert"])
def test_a_model_whose_tokens_see_too_much_is_refused(tmp_path: Path, family: str) -> None:
    other_language(family).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"a model of type '{family}' that reads a sample in a pack otherwise"):
        PretrainedLanguage.from_pretrained(tmp_path)


def test_tensor_ranks_do_not_share_it(models: dict[str, str]) -> None:
    shape = language_shape(Path(models["gpt_neox"]))
    check_layout(shape, 1, 3)
    with pytest.raises(ConfigError, match=r"--parallel\.tp 2 cannot split a language model of family gpt_neox"):
        check_layout(shape, 2, 1)


def test_the_planner_counts_it_whole(models: dict[str, str], tmp_path: Path) -> None:
    load = language_load(stage3(tmp_path, Path(models["gemma2"])), language_shape(Path(models["gemma2"])))
    model = AutoModelForCausalLM.from_pretrained(models["gemma2"])
    assert load.whole and load.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "no_such"}, "is no language model that transformers knows"),
        ({"model_type": "t5"}, "'t5', which is no causal language model of transformers"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "and quantized; quantized models must be"),
    ],
)
def test_what_is_no_language_model_is_refused(models: dict[str, str], change: dict[str, Any], message: str) -> None:
    path = Path(models["gpt_neox"]) / "config.json"
    good = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(good) | change))
        with pytest.raises(CheckpointError, match=message):
            language_shape(path.parent)
    finally:
        path.write_text(good)
