"""Assignment to a part of a tensor, as an operator that makes a new tensor; recognition reads it as a case distinction."""

from __future__ import annotations

from typing import Any

import torch


def assigned(tensor: torch.Tensor, index: Any, value: torch.Tensor) -> torch.Tensor:
    """`tensor` after ``tensor[index] = value``, the tensor itself being left as it was."""
    result = tensor.clone()
    result[index] = value
    return result
