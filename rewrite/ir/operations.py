"""What a site's body is made of: a short straight-line program over named tensors.

Token axes come third: query [B, H, Nq, D] and so on, as `rewrite.ir.attend` lays them out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from rewrite.ir.attend import Attend, BlockChoice, Groups, HeadMix, Normaliser
from rewrite.ir.grid_resize import GridResize
from rewrite.ir.grid_rotation import GridRotation
from rewrite.ir.input_operations import DynamicConv, Gate
from rewrite.ir.linear_operations import FeatureMap, Ones, SharedNormaliser, WindowSum
from rewrite.ir.mean_operations import EffectiveKeys, MeanProduct
from rewrite.ir.merge_operations import MergeTokens, Shortcut, TokenMatch, UnmergeTokens
from rewrite.ir.plain_operations import PlainOperation
from rewrite.ir.statistic import Statistic

__all__ = [
    "Attend",
    "BlockChoice",
    "Body",
    "DepthwiseConv",
    "DynamicConv",
    "EffectiveKeys",
    "FeatureMap",
    "Gate",
    "GridBias",
    "GridResize",
    "GridRotation",
    "Groups",
    "HeadMix",
    "MeanProduct",
    "MergeTokens",
    "Normaliser",
    "Ones",
    "Operation",
    "Parameter",
    "PlainOperation",
    "Pool",
    "ReceivedSinks",
    "RegionRoutes",
    "ReinforceHeads",
    "SharedNormaliser",
    "Shortcut",
    "SinkGroups",
    "SparseMap",
    "Statistic",
    "Sum",
    "TokenMatch",
    "UnmergeTokens",
    "VisualGroups",
    "WindowSum",
]


@dataclass(frozen=True)
class Pool:
    """Adaptive average pooling of tokens: source [B, H, prefix + N, D] -> result [B, H, prod(size), D]; prefix tokens are left out.

    grid: how the N tokens lie, raster order; a 1-tuple (N,) pools along the sequence. size: one entry per grid axis.
    """

    result: str
    source: str
    grid: tuple[int, ...]
    size: tuple[int, ...]
    prefix: int = 0


@dataclass(frozen=True)
class DepthwiseConv:
    """A depthwise convolution of tokens as an image; rows of prefix tokens are zero.

    source [B, H, prefix + h*w, D], weight [H*D, 1, k, k], bias [H*D]; zero padding k // 2; result shaped like source.
    """

    result: str
    source: str
    weight: str
    bias: str
    grid: tuple[int, int]
    prefix: int = 0


@dataclass(frozen=True)
class GridBias:
    """An attention bias interpolated to a grid (agent attention, Han et al. 2024, eq. 6).

    table [H, P, s, s] is resized bilinearly (align_corners=False) to the grid, rows [1, H, P, h, 1] and columns [1, H, P, 1, w] are
    added, and prefix [1, H, P, prefix] leads; result [1, H, P, prefix + h*w], transposed in the last two where asked.
    """

    result: str
    table: str
    rows: str
    columns: str
    prefix: str | None
    grid: tuple[int, int]
    transposed: bool = False


@dataclass(frozen=True)
class Sum:
    """result = the sum of equally shaped tensors."""

    result: str
    terms: tuple[str, ...]


@dataclass(frozen=True)
class SinkGroups:
    """Groups of keys for visual attention sinks (Kang et al. 2025), from the hidden states that enter the layer.

    hidden [B, N, C] and visual [B, N] (bool) cover the new tokens; earlier tokens of a KV cache keep the group they were given.
    A token is a sink where  max_{c in dims} |hidden_c| / sqrt(mean(hidden^2) + epsilon) > threshold  (dims empty: every channel).

    Three results: result [B, Nk] int32 (0 text, 1 visual, 2 visual sink, 3 text sink); active [B, N] int32, one where the query comes
    after the last visual token of a row that has a visual sink; count [B] float32, the visual tokens of the row.
    """

    noted: ClassVar[str] = "groups"

    result: str
    active: str
    count: str
    hidden: str
    visual: str
    dims: tuple[int, ...]
    threshold: float
    epsilon: float = 1e-6


@dataclass(frozen=True)
class VisualGroups:
    """Keys split into text and image; visual [B, N] (bool) covers the new tokens, earlier ones keep the group they were given.

    Two results: result [B, Nk] int32 (0 text, 1 visual); active [B, N] int32, one where the query comes after the last visual token of its
    row.
    """

    noted: ClassVar[str] = "groups"

    result: str
    active: str
    visual: str


@dataclass(frozen=True)
class ReceivedSinks:
    """Keys that draw attention in one head (ACT, Yu et al. 2024), of a causal attention of as many queries as keys.

    received [B, H, Nk]: the attention that each key receives, summed over the queries query [B, H, Nq, D], of which Nk - j see key j.
    result [B, H, Nk] int32: 1 where the mean over these queries exceeds `threshold`, but 0 for the first such key of a head, and in heads
    that are not among `heads` (None: all are). Keys of a KV cache keep what they were given; where there is one, new keys are 0.
    """

    noted: ClassVar[str] = "sinks"

    result: str
    received: str
    query: str
    threshold: float
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ReinforceHeads:
    """The outputs of the heads that look at the image most, times a factor.

    output [B, H, Nq, Dv], without: likewise, computed without the visual keys, active [B, Nq] int32; result as output. For a query that is
    active, the `heads` heads with the greatest |output - without|, the norm being over Dv, are scaled by `factor`.
    """

    result: str
    output: str
    without: str
    active: str
    heads: int
    factor: float


@dataclass(frozen=True)
class RegionRoutes:
    """Which regions of a grid attend to which: the `topk` of the greatest affinity (BiFormer, Zhu et al. 2023).

    query [B, H, prefix + N, D], key [B, Hkv, prefix + N, D], the N tokens in raster order on `grid`, which is cut into `regions` = (rows,
    columns) equal ones, R together. The affinity of two regions is the dot product of the mean query of one and the mean key of the other,
    summed over heads. result [B, R, R] bool: [b, r, s] says that region r attends to region s, `topk` for every r. It has no gradient.
    """

    result: str
    query: str
    key: str
    grid: tuple[int, int]
    regions: tuple[int, int]
    topk: int
    prefix: int = 0


@dataclass(frozen=True)
class SparseMap:
    """Which keys each query sees by a map of low rank (Sparsifiner, Wei et al. 2023): result [B, H, N, N] bool, without a gradient.

    query [B, H, N, D], key [B, Hkv, N, D]. Of parameters, which are for one N:  weight [D', D] and bias [D'] (queries and keys are narrowed
    alike, in every head), down [N, K] and up [N, K], by name.

        c = softmax_k(scale * q' (k'^T down))      of which each query keeps its `coefficients` greatest        [B, H, N, K]
        m = c u^T                                  u: up, with entries of magnitude `threshold` or less left out [B, H, N, N]

    and a query sees the `keys` keys of its greatest m. The first `prefix` queries (CLS, registers) see all.
    """

    result: str
    query: str
    key: str
    weight: str
    bias: str
    down: str
    up: str
    keys: int
    scale: float
    coefficients: int
    threshold: float
    prefix: int = 0


# Operations that sort keys into groups: their first result is kept for the keys that a KV cache holds, in the field `noted` of its
# `rewrite.notes.Note`.
Grouping = SinkGroups | VisualGroups | ReceivedSinks

Operation = (
    Attend
    | Statistic
    | Pool
    | DepthwiseConv
    | GridBias
    | Sum
    | SinkGroups
    | VisualGroups
    | ReceivedSinks
    | ReinforceHeads
    | RegionRoutes
    | SparseMap
    | PlainOperation
)


@dataclass(frozen=True)
class Parameter:
    """A tensor a pass adds to the model: `init` is "zeros", "ones", "eye", ("normal", std) or ("constant", value).

    "eye" is the identity on the last two axes, cut or filled with zeros where they differ in size.

    trainable: whether the model's own loss gives it a gradient; one that does not is registered without.
    """

    name: str
    shape: tuple[int, ...]
    init: str | tuple[str, float] = "zeros"
    trainable: bool = True


@dataclass(frozen=True)
class Body:
    """A site's computation: operations in order, the last one's result being the site's output."""

    operations: tuple[Operation, ...]
    parameters: tuple[Parameter, ...] = field(default=())

    @property
    def result(self) -> str:
        return self.operations[-1].result

    def attends(self) -> tuple[Attend, ...]:
        """The attention operations, in order."""
        return tuple(operation for operation in self.operations if isinstance(operation, Attend))
