"""transformers with, without, and with half of a torchvision."""

import torch


def let_transformers_import() -> None:
    """Make transformers' models importable whatever the state of torchvision; call it before importing one.

    transformers works where torchvision is absent, and fails where it is installed and does not import. It does not where its compiled
    part was built for another torch (a CUDA wheel beside a CPU-only torch): the package then registers fake implementations of two
    operators that were never defined. Declaring them is enough, since no model here calls them.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
