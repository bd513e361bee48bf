"""What tools.plan calls exact is counted on the model; what it estimates moves the right way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertModel

from cogvit.config import ModuleConfig, ParallelConfig, RunConfig, TeacherConfig, TextEncoderConfig
from cogvit.config.flags import load_preset
from cogvit.model.config import CogViTConfig
from cogvit.model.vit import CogViT
from cogvit.stages import check_run, stage_of
from cogvit.stages.cost import Load, attention_flops, muon_flops, product_flops
from cogvit.training.optim import role_of
from cogvit.training.orthogonal import QkvHeads, newton_schulz, parts_of_qkv
from configs.clusters import CLUSTERS
from tests.text_encoders import bert, write_encoder
from tools.corpus_cost import cost_of
from tools.plan import legal_layouts, main, refusal, teacher_flops
from tools.step_cost import Prediction, muon_bytes, predict


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
    assert counter.get_total_flops() == product_flops(cfg, patches) + attention_flops(cfg, patches, 16) + embedding


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
    assert counter.get_total_flops() == muon_flops(model.named_parameters(), cfg.num_heads, qkv) > 0


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


def cost(config: RunConfig, tp: int = 1, pp: int = 1, world: int = 32, cluster: str = "h100") -> Prediction:
    config = replace(config, parallel=replace(config.parallel, tp=tp, pp=pp))
    return predict(config, loads_of(config), world, 8, CLUSTERS[cluster])


def test_estimates_move_the_right_way() -> None:
    config = load_preset("stage1_cogvit_l")
    alone, tensor, pipeline = cost(config), cost(config, tp=2), cost(config, pp=2)
    assert tensor.memory_bytes < alone.memory_bytes
    assert alone.seconds.bubble == tensor.seconds.bubble == 0.0 < pipeline.seconds.bubble < pipeline.seconds.step / 2
    assert tensor.sent.tensor > 0.0 == alone.sent.tensor and pipeline.sent.pipeline > 0.0 == tensor.sent.pipeline
    slower = cost(replace(config, fusion="off"))
    assert slower.seconds.moved > 3 * alone.seconds.moved and slower.memory_bytes > alone.memory_bytes
    assert {name: cost(config, cluster=name).mfu < 0.6 for name in CLUSTERS} == dict.fromkeys(CLUSTERS, True)


def test_both_passes_of_stage_2_are_counted() -> None:
    """Four forwards' worth of products where there is more than one microbatch, three where one holds everything."""
    config = load_preset("stage2_cogvit_l")
    many, world = cost(config), 64
    data = replace(config.data, global_batch_images=8 * world, max_patches=1024)
    one = replace(config, data=data)
    single = cost(one, world=world)
    assert many.micro > 1 == single.micro
    for found, forwards, ranks in ((many, 4, 32), (single, 3, world)):
        products = sum(load.product_flops for load in loads_of(config if found is many else one))
        rate = CLUSTERS["h100"].flops * CLUSTERS["h100"].attained
        assert found.seconds.products == pytest.approx(forwards * products / (ranks * rate))
    assert many.seconds.loss > single.seconds.loss > 0.0 and many.sent.loss > single.sent.loss > 0.0


def test_messages_of_gradients_follow_the_flags() -> None:
    config = load_preset("stage1_cogvit_l")
    (load,), dp = loads_of(config), 32
    assert cost(config).sent.gradients == pytest.approx((dp - 1) / dp * 4 * load.parameters)
    half = replace(config, zero=replace(config.zero, gradient_messages="bf16"))
    beside = replace(config, zero=replace(config.zero, overlap=True))
    assert 2 * cost(half).sent.gradients == cost(config).sent.gradients == cost(beside).sent.gradients / 2
    staged = replace(config, precision="bf16", parallel=ParallelConfig(pipeline_messages="bf16"))
    assert 2 * cost(staged, pp=2).sent.pipeline == cost(config, pp=2).sent.pipeline


def test_muons_messages_are_those_that_were_counted_and_fall_with_the_ranks() -> None:
    """MB a rank of cogvit_l; `tests/unit/test_partition.py` counts buffers, which hold a rank's own pieces too."""
    (load,) = loads_of(load_preset("stage1_cogvit_l"))
    found = [muon_bytes(load, 1, 1, dp) / 1e6 for dp in (8, 32, 64, 128, 256)]
    assert found == pytest.approx([0.0, 8.4, 11.5, 11.0, 8.4], abs=0.1)


def test_more_ranks_than_there_are_images_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_preset("stage1_cogvit_l")
    assert refusal(config, cost(config)) == ""
    few = replace(config, data=replace(config.data, global_batch_images=256))
    assert refusal(few, cost(few)).startswith("too few images for so many ranks: 256 fill 25%")
    assert main(["stage1_cogvit_l", "--data.global-batch-images", "256", "--tp", "1", "--pp", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "too few images for so many ranks" in line and "--data.global-batch-images" in line


def test_layouts_that_wait_for_the_host_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_preset("stage1_cogvit_l")
    split = cost(config, tp=8, pp=1)
    assert split.launch_bound and not cost(config).launch_bound
    assert refusal(config, split).startswith("launch-bound: the host needs")
    assert main(["demo_stage1", "--nodes", "1", "--gpus-per-node", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "launch-bound" in line and "--data.tokens-per-pack" in line
    assert main(["stage1_cogvit_l"]) == 0
    assert "layouts left out, the first as launch-bound" in capsys.readouterr().out


def test_teachers_are_counted_by_their_files_or_their_names(tmp_path: Path) -> None:
    member, tokens = TeacherConfig(name="one", path=str(tmp_path)), 100
    assert teacher_flops(member, tokens, 10) is None
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 3, "hidden_size": 8, "intermediate_size": 16})
    )
    assert teacher_flops(member, tokens, 10) == 3 * tokens * (2 * (4 * 64 + 2 * 8 * 16) + 4 * 10 * 8)
    config = load_preset("stage1_cogvit_l")
    (load,) = loads_of(config)
    found = [teacher_flops(one, load.tokens, 256) for one in config.teachers.members]
    assert 0.5 < sum(flops for flops in found if flops) / (3 * load.forward_flops) < 0.7


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


def test_an_adapter_counts_as_what_the_fake_step_of_cogvlm2_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """GB of a rank: `tests/fake_cuda/whole_step.py`, records/memory_fake_20261130.md."""
    monkeypatch.chdir(Path(__file__).parents[2])  # the preset names a folder of the checkout
    config = load_preset("cogvlm2_19b")
    vision, adapter, language = loads_of(config)
    assert adapter.whole and adapter.learned == adapter.parameters > 0.19e9
    held = sum(load.parameters / (1 if load.whole else 4) for load in (vision, adapter, language))
    learned = sum(load.learned / (1 if load.whole else 4) for load in (vision, adapter, language))
    assert (held, learned) == (pytest.approx(5.04e9, rel=0.01), pytest.approx(3.03e9, rel=0.01))
    layout = replace(config, parallel=ParallelConfig(sequence=True))
    for tp, found_gb in ((4, 61.3), (8, 45.8)):
        assert cost(layout, tp=tp, world=8).memory_bytes / 1e9 == pytest.approx(found_gb, rel=0.05)
    still = replace(config, optim=replace(config.optim, adapter=ModuleConfig(lr_mult=0.0)))
    assert loads_of(still)[1].learned == 0


def test_towers_are_kept_together_unless_one_runs_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    config = load_preset("cogvlm2_19b")
    vision, _, language = loads_of(config)
    assert [vision.runs_twice(pp, micro=8) for pp in (1, 2)] == [False, True]
    assert not language.runs_twice(pp=2, micro=8)
    for load in loads_of(load_preset("stage2_cogvit_l")):
        assert [load.runs_twice(pp, micro) for pp, micro in ((1, 1), (1, 2), (2, 2))] == [False, True, True]
    assert cost(config, world=8).seconds.loss == cost(config, world=8).sent.loss == 0.0


def test_flags_of_the_trainer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    encoder = str(write_encoder(tmp_path, bert))
    flags = ["--nodes", "1", "--gpus-per-node", "2", "--text-encoder.path", encoder]
    assert main(["stage2_cogvit_l", *flags, "--data.tokenizer", "byt5", "--data.global-batch-images=512"]) == 0
    printed = capsys.readouterr().out
    assert "stage2_cogvit_l on 1 nodes x 2" in printed
    config = load_preset("stage2_cogvit_l")
    data = replace(config.data, global_batch_images=512, tokenizer="byt5")
    config = replace(config, data=data, text_encoder=TextEncoderConfig(encoder))
    assert f"{sum(load.parameters for load in loads_of(config)):,} parameters" in printed
    assert f"{3 * sum(load.forward_flops for load in loads_of(config)):.3g} FLOPs" in printed
    for argv, expected in (
        (["demo_stage2", "--node", "2"], "--node"),
        (["demo_stage2", "--nodes", "two"], "whole numbers"),
        (["demo_stage2", "--text-encoder.path", str(tmp_path / "gone")], "--text-encoder.path"),
        (["stage3_glm4_9b", "--language.path", str(tmp_path / "gone")], "gone does not exist"),
    ):
        assert main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and expected in line


def test_the_table_names_what_it_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage2_cogvit_l", "--tp", "2", "--pp", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "stage2_cogvit_l on 4 nodes x 8 h100" in lines[0] and len(lines) == 7
    assert lines[4].startswith("fastest: products ") and "microbatches" in lines[4]
    assert lines[5].startswith("save: ") and lines[6].startswith("resume: ")


def test_what_a_corpus_costs_hardly_grows_with_it_and_nothing_with_the_square_of_the_ranks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    small, large = (cost_of(samples, ParallelConfig(), 4096, 8, 6e9) for samples in (1e7, 8e9))
    assert large.open_ms < 1000 and large.private_mb < 200 and small.first_batch_s == large.first_batch_s
    assert small.open_files == large.open_files <= 300 and large.resume_bytes == large.save_bytes == 6e9
    assert cost_of(8e9, ParallelConfig(), 2048, 8, 6e9).store_words * 2 == large.store_words
    assert main(["stage2_cogvit_l", "--tp", "1", "--pp", "1", "--samples", "8e9"]) == 0
    assert "corpus of 8,000,000,000 samples: open 67 ms" in capsys.readouterr().out
    assert main(["stage2_cogvit_l", "--samples", "many"]) == 2
    assert "--samples many is no number of samples, like 8e9" in capsys.readouterr().err


def test_what_no_layout_can_run_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, reason in (
        (
            ["--tp", "1", "--pp", "1", "--data.global-batch-images", "4"],
            "32 data-parallel ranks are more than the 4 images of a step",
        ),
        (["--optim.lr", "-1"], "optim.lr=-1.0 must be finite and not negative"),
        (["--nodes", "0"], "--nodes 0 and --gpus-per-node 8 must be at least 1"),
        (["--tp", "3"], "32 processes cannot be split into tp=3 x pp=1"),
    ):
        assert main(["stage2_cogvit_l", *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and reason in line


def test_a_teacher_of_no_known_shape_is_not_counted(tmp_path: Path) -> None:
    member = TeacherConfig("convnext", str(tmp_path))
    assert teacher_flops(member, 100, 10) is None
    for text in ('{"hidden_sizes": [96, 192]}', "half a fi", "[]", '{"vision_config": {"hidden_size": 8}}'):
        (tmp_path / "config.json").write_text(text)
        assert teacher_flops(member, 100, 10) is None
