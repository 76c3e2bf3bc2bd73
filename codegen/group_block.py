"""Groups of keys on one block of queries: masses, weights, and the derivatives of the weights.

A group's mass is m_g = sum over its keys of the softmax weights a[i,j]; the block's weights are  a[i,j] * weight_g(j)(m).
"""

from __future__ import annotations

import sympy
import torch

from codegen.score_block import ScoreBlock
from codegen.tensor_reads import derivative
from rewrite.ir.expression import mass
from rewrite.ir.operations import Groups
from rewrite.ir.semantics import evaluate_expressions


class GroupBlock:
    """The groups of one `ScoreBlock`.

    one_hot [B, 1 or H, columns, G]: which group a key is in. masses, weights [B, H, rows, G].
    """

    def __init__(self, block: ScoreBlock, groups: Groups, attention: torch.Tensor) -> None:
        """attention: the softmax weights [B, H, rows, columns]. Adds the masses to the block's values."""
        self.block, self.groups = block, groups
        member = block.values[groups.membership].squeeze(2)
        codes = torch.arange(len(groups.names), device=member.device)
        self.one_hot: torch.Tensor = (member[..., None] == codes).to(attention.dtype).expand(attention.shape[0], -1, -1, -1)
        self.masses = self.per_group(attention)
        for index, name in enumerate(groups.names):
            block.values[str(mass(name))] = self.masses[..., index : index + 1]
        self.weights = self._stack(evaluate_expressions(groups.weights, block.values))

    def per_group(self, terms: torch.Tensor) -> torch.Tensor:
        """Sums over the keys of each group: [B, H, rows, columns] -> [B, H, rows, G]."""
        # A product of few columns takes MKL five times as long as the same one transposed.
        if self.one_hot.shape[1] == 1:
            sums = self.one_hot[:, 0].transpose(-2, -1) @ terms.flatten(1, 2).transpose(-2, -1)
            return sums.transpose(-2, -1).reshape(*terms.shape[:3], -1)
        return (self.one_hot.transpose(-2, -1) @ terms.transpose(-2, -1)).transpose(-2, -1)

    def per_key(self, terms: torch.Tensor) -> torch.Tensor:
        """What each key's group says: [B, H, rows, G] -> [B, H, rows, columns], zero for keys of no group."""
        matrix = self.one_hot.transpose(-2, -1)
        # Heads that share a matrix are rows of one product.
        return (terms.flatten(1, 2) @ matrix[:, 0]).view(*terms.shape[:3], -1) if matrix.shape[1] == 1 else terms @ matrix

    def _stack(self, terms: list[object]) -> torch.Tensor:
        """One term per group, each broadcasting against [B, H, rows, 1]; zero where a group has no mass (a weight may divide by it)."""
        wide = [torch.as_tensor(term, dtype=self.masses.dtype, device=self.masses.device).expand_as(self.masses[..., :1]) for term in terms]
        return torch.cat(wide, dim=-1).masked_fill(self.masses == 0, 0.0)

    def slopes(self, variable: sympy.Basic) -> torch.Tensor | None:
        """d weights / d variable, [B, H, rows, G]; None where every weight is constant in it."""
        slopes = [derivative(weight, variable) for weight in self.groups.weights]
        return None if all(slope == 0 for slope in slopes) else self._stack(evaluate_expressions(slopes, self.block.values))

    def mass_gradient(self, received: torch.Tensor) -> torch.Tensor:
        """received [B, H, rows, G], the gradient of every weight -> the gradient of every mass, likewise."""
        gradients = []
        for name in self.groups.names:
            slopes = self.slopes(mass(name))
            zero = torch.zeros_like(received[..., :1])
            gradients.append(zero if slopes is None else (slopes * received).sum(-1, keepdim=True))
        return torch.cat(gradients, dim=-1)
