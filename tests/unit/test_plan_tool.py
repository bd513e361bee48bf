"""What tools.plan calls exact is counted on the model; what it estimates moves the right way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertModel

from cogvit.config import ParallelConfig, RunConfig, TextEncoderConfig
from cogvit.config.flags import load_preset
from cogvit.model.config import CogViTConfig
from cogvit.model.vit import CogViT
from cogvit.stages import check_run, stage_of
from cogvit.stages.cost import Load, forward_flops, muon_flops
from cogvit.training.optim import role_of
from cogvit.training.orthogonal import QkvHeads, newton_schulz, parts_of_qkv
from configs.clusters import CLUSTERS
from tests.text_encoders import bert, write_encoder
from tools.plan import legal_layouts, main, predict


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_flops_are_those_of_the_blocks(mlp: str) -> None:
    cfg = CogViTConfig(
        image_size=32,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=4,
        mlp=mlp,
        use_cls_token=False,  # type: ignore[arg-type]
    )
    model, images = CogViT(cfg), 2
    # The counter knows the plain attention alone.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(images, 3, 32, 32))
    patches = images * 16
    embedding = 2 * patches * 3 * 8 * 8 * 32
    assert counter.get_total_flops() == forward_flops(cfg, patches, 16) + embedding


@pytest.mark.parametrize("qkv", ["split", "heads", "fused"])
def test_flops_of_muon_are_those_of_its_matrices(qkv: Literal["split", "heads", "fused"]) -> None:
    cfg = CogViTConfig(image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, mlp="swiglu")
    model = CogViT(cfg)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for name, parameter in model.named_parameters():
            if role_of(name, parameter) == "block_matrix":
                parts = parts_of_qkv(parameter, QkvHeads(4, 4), qkv) if "qkv" in name else [parameter]
                for part in parts:
                    newton_schulz(part)
    assert counter.get_total_flops() == muon_flops(model, cfg.num_heads, qkv) > 0


def loads_of(config: RunConfig) -> list[Load]:
    return stage_of(config).loads(config)


def test_parameters_of_the_reference() -> None:
    (load,) = loads_of(load_preset("stage1_reference"))
    with torch.device("meta"):
        reference = CogViT(CogViTConfig())
    assert load.parameters == sum(parameter.numel() for parameter in reference.parameters())


def test_layouts_are_legal_and_keep_tensor_ranks_on_a_node() -> None:
    config = load_preset("stage1_cogvit_l")
    layouts = legal_layouts(config, world=32, per_node=8)
    assert len(layouts) > 4
    for layout in layouts:
        check_run(layout, 32)
        assert 8 % layout.parallel.tp == 0


def cost(config: RunConfig, tp: int, pp: int) -> tuple[float, float, float]:
    config = replace(config, parallel=ParallelConfig(tp=tp, pp=pp))
    one = predict(config, loads_of(config), 32, 8, CLUSTERS["h100"])
    return one.memory_bytes, one.bubble, one.sent_bytes


def test_estimates_move_the_right_way() -> None:
    config = load_preset("stage1_cogvit_l")
    alone, tensor, pipeline = cost(config, 1, 1), cost(config, 2, 1), cost(config, 1, 2)
    assert tensor[0] < alone[0] and alone[1] == tensor[1] == 0.0 < pipeline[1] < 0.5
    assert tensor[2] > alone[2]


def test_a_text_encoder_of_transformers_is_counted_whole(tmp_path: Path) -> None:
    encoder = TextEncoderConfig(str(write_encoder(tmp_path, bert)))
    config = replace(load_preset("demo_stage2"), text_encoder=encoder, precision="fp32")
    vision, text = loads_of(config)
    weights = sum(p.numel() for name, p in BertModel.from_pretrained(encoder.path).named_parameters())
    pooler = 32 * 32 + 32  # which the mean over tokens does without
    assert text.whole and not vision.whole and text.parameters == weights - pooler
    assert (text.width, text.depth, text.tokens) == (32, 2, 256 * config.text.max_tokens)
    assert text.forward_flops == 2 * text.tokens * (2 * (4 * 32**2 + 2 * 32 * 48) + 4 * config.text.max_tokens * 32)
    # Tensor ranks and stages share the vision tower and none of the encoder.
    loads, cluster = [vision, replace(text, parameters=10**9)], CLUSTERS["h100"]
    alone, shared = (
        predict(replace(config, parallel=ParallelConfig(tp=tp, pp=pp)), loads, 4, 8, cluster).memory_bytes
        for tp, pp in ((1, 1), (2, 2))
    )
    assert 4 * 10**9 < alone < shared  # ZeRO's shards over four replicas, or over one


def test_flags_of_the_trainer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    encoder = str(write_encoder(tmp_path, bert))
    flags = ["--nodes", "1", "--gpus-per-node", "2", "--text-encoder.path", encoder]
    assert main(["demo_stage2", *flags, "--data.global-batch-images=512"]) == 0
    printed = capsys.readouterr().out
    assert "demo_stage2 on 1 nodes x 2" in printed
    config = replace(load_preset("demo_stage2"), text_encoder=TextEncoderConfig(encoder))
    config = replace(config, data=replace(config.data, global_batch_images=512))
    assert f"{sum(load.parameters for load in loads_of(config)):,} parameters" in printed
    assert f"{3 * sum(load.forward_flops for load in loads_of(config)):.3g} FLOPs" in printed
    for argv, expected in (
        (["demo_stage2", "--node", "2"], "--node"),
        (["demo_stage2", "--nodes", "two"], "whole numbers"),
        (["demo_stage2", "--text-encoder.path", str(tmp_path / "gone")], "--text-encoder.path"),
    ):
        assert main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and expected in line


def test_the_table_names_what_it_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage2_cogvit_l", "--tp", "2", "--pp", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "stage2_cogvit_l on 4 nodes x 8 h100" in lines[0] and len(lines) == 4
