"""Pieces between a layer's products give the same compiled; where nothing can be compiled they run as they stand."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cogvit.model.position import rotary_2d
from cogvit.parallel import pieces
from cogvit.parallel.pieces import Pieces, fused_pieces, pieces_on

S, H, K, D, F = 24, 4, 16, 64, 96


@pytest.fixture(autouse=True)
def one_compiler() -> Iterator[None]:
    """No pool of compiling processes, which would outlive the test."""
    import torch._inductor.config as inductor

    with inductor.patch(compile_threads=1):
        yield


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the pieces said; torch's compiler says more, to its own loggers."""
    return [record.getMessage() for record in caplog.records if record.name == pieces.log.name]


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(*shape, generator=g).to(dtype).requires_grad_()


def run(of: Pieces) -> dict[str, list[Tensor]]:
    """What every piece gives in bf16 around an fp32 stream, and its gradients."""
    half = torch.bfloat16
    weight, bias, gamma, mlp_bias = rand(D), rand(D), rand(D), rand(2 * F)
    x, residual, h, q, k = (
        rand(S, 1, D, dtype=half),
        rand(S, 1, D),
        rand(S, 1, 2 * F, dtype=half),
        *(rand(S, H, K, dtype=half) for _ in range(2)),
    )
    q_weight, k_weight = rand(K), rand(K)
    angles = rotary_2d(torch.stack([torch.arange(S) // 6, torch.arange(S) % 6], 1), K)
    depth = torch.linspace(0.5, 1.5, S)
    outputs = {
        "normalized": (of.normalized(residual, (weight, bias), 1e-5, half),),
        "heads": of.heads(q, k, ((q_weight, None), (k_weight, None)), angles, 1e-5, half),
        "activated": (of.activated(h, mlp_bias, gated=True),),
        "with_branch": (of.with_branch(residual, x, bias, gamma, depth),),
    }
    inputs = {
        "normalized": (residual, weight, bias),
        "heads": (q, k, q_weight, k_weight),
        "activated": (h, mlp_bias),
        "with_branch": (residual, x, bias, gamma),
    }
    found = {}
    for name, out in outputs.items():
        loss = sum((part.float() * torch.linspace(-1, 1, part.numel()).view_as(part)).sum() for part in out)
        found[name] = [*out, *torch.autograd.grad(loss, inputs[name])]
    return found


@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs g++, which is not here")
def test_a_compiled_piece_gives_what_the_plain_one_gives(caplog: pytest.LogCaptureFixture) -> None:
    fused, plain = run(fused_pieces()), run(Pieces())
    assert not told(caplog)
    for name, tensors in plain.items():
        for number, (expected, actual) in enumerate(zip(tensors, fused[name], strict=True)):
            assert actual.dtype == expected.dtype
            error = (actual.double() - expected.double()).norm() / expected.double().norm()
            # bf16 rounds by 4e-3, and the plain ones between their passes too.
            assert error < 6e-3, f"{name} {number}: {error:.1e}"


def test_a_compile_that_fails_costs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    import torch._inductor.config as inductor

    compiler = pieces._Compiler()
    pair = [compiler.compiled(piece) for piece in (lambda x: x.sin() + 1.0, lambda x: x.cos() * 2.0)]
    x = torch.linspace(0.0, 1.0, 7)
    broken = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    with caplog.at_level(logging.WARNING), inductor.patch(broken):
        assert torch.equal(pair[0](x), x.sin() + 1.0)
        assert torch.equal(pair[1](x), x.cos() * 2.0)
    (line,) = told(caplog)
    assert line.startswith("torch.compile failed, --fusion is off: ") and "\n" not in line


def test_where_pieces_are_compiled() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    fused = fused_pieces()
    assert pieces_on(cpu, "auto") == pieces_on(cpu, "off") == pieces_on(cuda, "off") == Pieces()
    assert pieces_on(cpu, "on") is pieces_on(cuda, "on") is pieces_on(cuda, "auto") is fused
