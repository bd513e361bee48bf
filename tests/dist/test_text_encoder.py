"""A text encoder of transformers in stage 2: every layout trains as one process, and one process as autograd says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogvit.config import DataConfig, RunConfig, TextEncoderConfig
from cogvit.errors import ConfigError
from cogvit.model.pretrained import with_encoder_shape
from cogvit.objective.siglip import ContrastModel
from cogvit.parallel.mesh import start_mesh
from cogvit.stages import build, check_run
from cogvit.training.engine import Engine
from tests.dist.runs import Case, Trace, micro_of, run_config, whole, whole_state
from tests.dist.test_pairwise import step_against_autograd
from tests.pool import Pool
from tests.text_encoders import bert, siglip2, write_encoder

STEPS = 2
ALONE = Case(stage="contrast", depth=2)
LAYOUTS = [
    pytest.param(Case(world=2, stage="contrast", depth=2), marks=pytest.mark.long),
    Case(world=2, stage="contrast", depth=2, optimizer="muon", zero=2),
    pytest.param(Case(world=2, tp=2, sequence=True, stage="contrast", depth=2), marks=pytest.mark.long),
    pytest.param(Case(world=4, tp=2, pp=2, stage="contrast", depth=2), marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextEncoderConfig]:
    directory = tmp_path_factory.mktemp("encoders")
    return {
        "bert": TextEncoderConfig(str(write_encoder(directory, bert)), "mean"),
        "siglip2": TextEncoderConfig(str(write_encoder(directory, siglip2)), "own"),
    }


def config_of(case: Case, encoder: TextEncoderConfig, locked: bool = False) -> RunConfig:
    config = run_config(case)
    optim = replace(config.optim, text=replace(config.optim.text, lr_mult=0.0 if locked else 1.0))
    data = DataConfig(max_patches=16, tokens_per_pack=96, images_per_pack=8, text_tokens_per_pack=80)
    config = replace(config, text_encoder=encoder, data=data, optim=optim, init_log_t=1.5, init_bias=-3.0)
    check_run(config, case.world)
    return with_encoder_shape(config)


def train(rank: int, world: int, case: Case, encoder: TextEncoderConfig, locked: bool) -> Trace:
    config = config_of(case, encoder, locked)
    mesh = start_mesh(config.parallel)
    model, objective = build(config, mesh, {})
    engine = Engine(model, config, mesh)
    gradients = whole(engine.plain_gradients(objective, micro_of(case, mesh)), mesh)
    reports = [engine.step(objective, micro_of(case, mesh), step) for step in range(STEPS)]
    losses, norms = [report.terms["loss"] for report in reports], [report.grad_norm for report in reports]
    return Trace(losses, norms, gradients, whole_state(engine, mesh), 0)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layout_trains_as_one_process(pool: Pool, encoders: dict[str, TextEncoderConfig], case: Case) -> None:
    encoder = encoders["siglip2" if case.pp == 2 else "bert"]
    expected: Trace = pool.run(train, 1, (case.alone(), encoder, False))[0]
    actual: Trace = pool.run(train, case.world, (case, encoder, False), timeout_s=100.0)[0]
    assert actual.losses == pytest.approx(expected.losses, rel=1e-6)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5 if case.optimizer == "sgd" else 1e-4)
    assert actual.gradients.keys() == expected.gradients.keys()
    assert any(name.startswith("text.encoder.") for name in actual.gradients)
    for name, gradient in expected.gradients.items():
        error = (actual.gradients[name] - gradient).norm()
        assert error <= max(1e-6, 1e-5 * float(gradient.norm())), f"{name}: {error} of {gradient.norm()}"
    assert actual.state.keys() == expected.state.keys()
    tolerance = 1e-5 if case.optimizer == "sgd" else 1e-4
    for key, tensor in expected.state.items():
        if case.optimizer == "sgd" or not key.endswith(("k_norm.bias", "key.bias")):  # whose gradients are rounding
            torch.testing.assert_close(
                actual.state[key], tensor, rtol=0.0, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
            )


def steps_and_autograd(
    rank: int, world: int, encoder: TextEncoderConfig
) -> dict[int, tuple[float, float, dict[str, Tensor], dict[str, Tensor]]]:
    config = config_of(ALONE, encoder)
    mesh = start_mesh(config.parallel)
    model, objective = build(config, mesh, {})
    engine = Engine(model, config, mesh)
    assert isinstance(model, ContrastModel)
    micro = micro_of(ALONE, mesh)
    return {k: step_against_autograd(model, objective, micro[:k], engine.schedule) for k in (1, 2)}


def test_a_step_leaves_the_gradients_of_autograd(pool: Pool, encoders: dict[str, TextEncoderConfig]) -> None:
    answers = pool.run(steps_and_autograd, 1, (encoders["bert"],))[0]
    for num_micro, (loss, expected, grads, references) in answers.items():
        assert loss == pytest.approx(expected, rel=1e-6)
        assert grads.keys() == references.keys()
        for name, reference in references.items():
            atol = 1e-6 * max(1.0, float(reference.abs().max()))
            torch.testing.assert_close(
                grads[name], reference, rtol=1e-5, atol=atol, msg=lambda m, n=name, k=num_micro: f"{n} of {k}: {m}"
            )


def test_a_locked_encoder_keeps_its_weights(pool: Pool, encoders: dict[str, TextEncoderConfig]) -> None:
    case = Case(world=2, pp=2, stage="contrast", depth=2)
    trace: Trace = pool.run(train, 2, (case, encoders["bert"], True))[0]
    from transformers import BertModel

    start = dict(BertModel.from_pretrained(encoders["bert"].path).named_parameters())
    found = {name: tensor for name, tensor in trace.state.items() if name.startswith("master/text.encoder.")}
    assert len(found) == len(start) - 2  # without its pooler
    for name, tensor in found.items():
        assert torch.equal(tensor, start[name.removeprefix("master/text.encoder.")]), name
    assert not any(g.any() for name, g in trace.gradients.items() if name.startswith("text."))
    assert trace.gradients["text_proj.weight"].any() and trace.gradients["vision.patch_embed.proj.weight"].any()


def build_alone(rank: int, world: int, config: RunConfig) -> str:
    mesh = start_mesh(config.parallel)
    with pytest.raises(ConfigError) as caught:
        build(config, mesh, {})
    return str(caught.value)


def test_a_bad_checkpoint_stops_every_stage(pool: Pool, encoders: dict[str, TextEncoderConfig], tmp_path: Path) -> None:
    config = config_of(Case(world=2, pp=2, stage="contrast", depth=2), encoders["bert"])
    config = replace(config, text_encoder=TextEncoderConfig(str(tmp_path / "gone")))
    for message in pool.run(build_alone, 2, (config,)):
        assert "--text-encoder.path" in message and "does not exist" in message
