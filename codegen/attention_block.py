"""Every step of an attention operation on one block of queries, forward and back.

    qk -> score -> heads mixed -> normalised -> heads mixed -> weight expression -> normalised again -> groups

With a the softmax weights, w_g the weight of group g, m_g its mass, t[i,j] the gradient of the final weights, and
c_g = sum_{j in g} a[i,j] t[i,j], groups give

    da[i,j] = w_g(j) t[i,j] + sum_g c_g dw_g/dm_g(j)        and a tensor that the weights read  sum_g c_g dw_g/dtensor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from codegen.group_block import GroupBlock
from codegen.head_mix import mix_gradients, mix_heads
from codegen.normalise import divided, hidden_score, normalise, normalise_gradients
from codegen.score_block import ScoreBlock
from codegen.tensor_reads import TensorGradients, derivative
from rewrite.ir.expression import QK, W
from rewrite.ir.operations import HeadMix


class AttentionBlock:
    """The steps of one `ScoreBlock`, whose dot products have been read, kept as the way back needs them.

    weights [B, H, rows, columns]: what the values are multiplied by. lse [B, H, rows]: see `codegen.normalise`.
    """

    def __init__(self, block: ScoreBlock, tensors: Mapping[str, torch.Tensor]) -> None:
        """tensors: all operands by name, whole."""
        attend = self.attend = block.attend
        self.block, self.tensors = block, tensors
        self.scores = block.scores()
        sink = None if attend.sink is None else block.filled(attend.sink, self.scores[..., :1])
        hidden = block.hidden()
        mixed = block.hide(mix_heads(attend.score_mix, self.scores, tensors), hidden, hidden_score(attend))
        self.normalised = normalise(attend, mixed, hidden, sink, block.values)
        self.lse = self.normalised.lse
        self.weights = self.normalised.weights
        if attend.weight_mix is not None:
            self.weights = self._seen(mix_heads(attend.weight_mix, self.weights, tensors))
        if attend.weight != W:
            block.values["w"] = self.weights
            self.weights = block.filled(attend.weight, self.weights)
        if attend.renormalised:
            self.sum = self.weights.sum(-1, keepdim=True)
            self.weights = divided(self.weights, self.sum)
        self.groups = None if attend.groups is None else GroupBlock(block, attend.groups, self.weights)
        if self.groups is not None:
            self.weights = self.groups.per_key(self.groups.weights).mul_(self.weights)

    def _seen(self, terms: torch.Tensor) -> torch.Tensor:
        hidden = self.normalised.hidden
        return terms if hidden is None else terms.masked_fill(hidden, 0.0)

    def dot_gradient(self, d_weights: torch.Tensor, d_lse: torch.Tensor, gradients: TensorGradients) -> torch.Tensor:
        """The gradient of qk [B, H, rows, columns], from that of the weights and of lse [B, H, rows, 1]; the tensors' is added."""
        attend, block = self.attend, self.block
        values, visit = block.values, block.visit
        if self.groups is not None:
            d_weights = self._through_groups(self.groups, d_weights, gradients)
        if attend.renormalised:
            d_weights = divided(d_weights - (self.weights * d_weights).sum(-1, keepdim=True), self.sum)
        if attend.weight != W:
            gradients.through(attend.weight, d_weights, values, visit)
            d_weights = d_weights * block.filled(derivative(attend.weight, W), d_weights)
        if attend.weight_mix is not None:
            d_weights = _through_mix(attend.weight_mix, self._seen(d_weights), self.normalised.weights, self.tensors, gradients)
        d_scores, d_sink = normalise_gradients(attend, self.normalised, d_weights, d_lse)
        if attend.sink is not None and d_sink is not None:
            gradients.through(attend.sink, d_sink, values, visit)
        if attend.score_mix is not None:
            d_scores = _through_mix(attend.score_mix, d_scores, self.scores, self.tensors, gradients)
        gradients.through(attend.score, d_scores, values, visit)
        slope = derivative(attend.score, QK)
        # A decay grows without bound where the mask hides it: infinite there, it would make NaN of a gradient of zero.
        return d_scores * (block.filled(slope, d_scores) if slope.is_number else self._seen(block.filled(slope, d_scores)))

    def _through_groups(self, groups: GroupBlock, d_weights: torch.Tensor, gradients: TensorGradients) -> torch.Tensor:
        counted = groups.per_group(self.normalised.weights * d_weights)
        for gradient in gradients:
            slopes = groups.slopes(gradient.read)
            if slopes is not None:
                gradient.add((slopes * counted).sum(-1, keepdim=True), self.block.values, self.block.visit)
        return d_weights * groups.per_key(groups.weights) + groups.per_key(groups.mass_gradient(counted))


def _through_mix(
    mix: HeadMix, received: torch.Tensor, terms: torch.Tensor, tensors: Mapping[str, torch.Tensor], gradients: TensorGradients
) -> torch.Tensor:
    """The gradient of the terms that were mixed; those of the matrix and the bias are added."""
    d_terms, found = mix_gradients(mix, received, terms, tensors)
    gradients.add_whole(found)
    return d_terms
