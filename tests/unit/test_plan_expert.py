"""What visual experts cost as the planner counts it: parameters, of which the language model's learn nothing."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cogvit.config import RunConfig
from cogvit.config.flags import load_preset
from cogvit.model.config import CrossModuleConfig, ExpertConfig
from cogvit.stages.cost import cross_load, language_load, vision_load
from cogvit.stages.language import language_shape
from tools.plan import main

LANGUAGE, EXPERTS, ENCODER = 8_030_261_248, 6_979_518_464, 4_296_961_536  # of CogVLM2, experts with biases


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> RunConfig:
    monkeypatch.chdir(request.config.rootpath)  # the preset names a folder of the checkout
    return load_preset("cogvlm2_19b")


def test_a_token_costs_what_it_costs_the_language_model(config: RunConfig) -> None:
    load = language_load(config, language_shape(config))
    bare = replace(config, expert=ExpertConfig())
    alone = language_load(bare, language_shape(bare))
    assert load.forward_flops == alone.forward_flops
    assert (load.parameters, load.frozen) == (LANGUAGE + EXPERTS, LANGUAGE)
    assert alone.parameters == alone.frozen == LANGUAGE
    assert vision_load(config).parameters == ENCODER


def test_the_published_shapes_fit_a_node(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cogvlm2_19b", "--nodes", "1"]) == 0
    first = next(line for line in capsys.readouterr().out.splitlines() if re.match(r" +8 +1 +1 ", line))
    memory_gb = float(first.split()[3])
    assert 30.0 < memory_gb < 80.0 and "does not fit" not in first


def test_a_cross_module_counts(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    crossed = replace(config, cross=CrossModuleConfig(1120))
    encoder = cross_load(crossed)
    assert 0.29e9 < encoder.parameters == encoder.learned < 0.32e9 and encoder.pack_tokens == 80**2
    grown, without = (language_load(one, language_shape(one)) for one in (crossed, config))
    assert grown.learned - without.learned == 32 * (4 * 1024 * 4096 // 2 + 2 * 1024 * 1024 + 4096)
    assert grown.frozen == without.frozen and grown.forward_flops > without.forward_flops
    assert main(["cogvlm2_19b", "--nodes", "1", "--cross.image-size", "1120"]) == 0
    assert "does not fit" not in capsys.readouterr().out.splitlines()[3]
