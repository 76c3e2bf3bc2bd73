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

import codegen
from rewrite import prediction
from rewrite.machine import Ceiling, Machine

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):
    # The compiled part of the wheel needs a CUDA build of torch; without it the package imports once these two operators are declared.
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


# A device whose every call is free and whose every way of computing is as fast as any: no test depends on what this machine can do.
EVEN = Machine(dict.fromkeys((*codegen.SKELETONS, "sdpa", "eager", "large", "plain", "linear", "moved"), Ceiling(0.0, 1e11)), 1e15, 1e15)


@pytest.fixture(autouse=True)
def _even_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "machine_of", lambda device, dtype: EVEN)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    """Each test compiles for itself and starts from the same random state."""
    torch._dynamo.reset()
    torch.manual_seed(0)
