"""Set-up for every test: no network, no caches that hide work, and a torchvision that imports without its compiled part."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Inductor's caches would hide whether a graph was compiled at all.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
os.environ.setdefault("REWRITE_CACHE_DIR", tempfile.mkdtemp(prefix="rewrite-tests-"))

import pytest
import torch

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):
    # The compiled part of the wheel needs a CUDA build of torch; without it the package imports once these two operators are declared.
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    """Each test compiles for itself and starts from the same random state."""
    torch._dynamo.reset()
    torch.manual_seed(0)
