"""Every test here needs a GPU and says so where there is none: `make test-gpu`."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """Skip without CUDA; with it, matrix products are as exact as on the CPU that they are compared with."""
    if not torch.cuda.is_available():
        build = "a CPU build of torch" if torch.version.cuda is None else "no device that torch can see"
        pytest.skip(f"needs a GPU: {build}")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def device() -> torch.device:
    """Where the tests of one process run."""
    return torch.device("cuda")
