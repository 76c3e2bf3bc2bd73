"""Token operations: some tokens of a stream leave it at one place of its stack of layers.

They say what; the engine gathers, carries positions through what follows, and puts tokens back where outputs are read. Every row of a batch
keeps tokens of its own, in the order and with the positions they had.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Place = Literal["before", "between"]
Rounding = Literal["ceil", "floor", "round"]


@dataclass(frozen=True)
class Received:
    """A token's score is the attention that it receives: the mean over heads, summed over the queries `rows` and over `sites`, by name.

    rows: (start, stop) as of a slice of the queries, negative from the end: (0, 1) is a leading CLS token, (-1, None) the last query. The
    attention is that of the tokens that are there when the site runs. A site of the layer that the tokens leave in front of is read with
    them still there: its queries and keys are computed for that. Sites of the vision tower that made the visual tokens score these as the
    patches they were, picture by picture. joined: the heads as one, whose query and key are those of all heads side by side: the softmax of
    the sum over heads of q_h k_h / sqrt(H D), for unmasked attention.
    """

    sites: tuple[str, ...]
    rows: tuple[int, int | None]
    joined: bool = False


@dataclass(frozen=True)
class Irrelevant:
    """The visual tokens of a row leave where the attention that all of them together receive is less than `below`."""

    rule: Received
    below: float


# What a router adds to the site of the layer that it stands in front of: [width, 2C], [2, width], and [1], which training leaves at zero.
ROUTER = ("router_up", "router_down", "router_margin")


@dataclass(frozen=True)
class Routed:
    """The visual tokens of a row leave where a learned router says so: down gelu(up f), whose second number plus the margin is greater than
    the first. f, [2C], is the mean of the text tokens behind the image but the last, and the last, in front of the layer."""

    width: int


@dataclass(frozen=True)
class Exit:
    """Visual tokens leave the stack in front of one layer: that layer and all later ones do not see them.

    stack: number of the stack. layer: the first layer without visual tokens, from 0. when: in what calls; None is in all. What the data
    decide is decided for each row of a batch by itself.
    """

    stack: int
    layer: int
    by: str
    when: Irrelevant | Routed | None = None


@dataclass(frozen=True)
class Spread:
    """Tokens far apart from each other are kept, greedily (k-centre). The distance is one minus the cosine of their features."""


@dataclass(frozen=True)
class Drawn:
    """Tokens are kept at random, in each row others; the same for the same seed and shapes. What other rules have to be better than."""

    seed: int


@dataclass(frozen=True)
class Handed:
    """Those visual tokens are kept that were chosen where their vision tower ran, in an earlier graph."""


@dataclass(frozen=True)
class Pooled:
    """Of each cell x cell patches of a picture one token is kept, in the place of the first: their mean (M3, Cai et al. 2024).

    site: the last one in a vision tower that the patches went through. They are averaged as they enter the text.
    """

    site: str
    cell: int


@dataclass(frozen=True)
class Count:
    """How many candidates are kept of those there are, one at least: a share (a float) of them, rounded, or a number (an int).

    of: what a share is a share of, the candidates that are "present" at this place or "all" that the stack began with. mass: each row keeps
    of these the fewest whose scores, the greatest first, sum up to this share of the sum of all, so that rows keep different numbers.
    """

    keep: float | int
    rounding: Rounding = "round"
    of: Literal["present", "all"] = "present"
    mass: float | None = None

    def number(self, present: int, every: int) -> int:
        """The candidates that are kept, of `present` now and `every` at the start."""
        if isinstance(self.keep, float):
            share = self.keep * (present if self.of == "present" else every)
            wanted = {"ceil": math.ceil(share), "floor": math.floor(share), "round": math.floor(share + 0.5)}[self.rounding]
        else:
            wanted = self.keep
        return max(1, min(wanted, present))


@dataclass(frozen=True)
class Contextual:
    """What becomes of a picture's patches that would leave: `count` of them, evenly spaced, stay for all (VisionZip, Yang et al. 2025).

    Each of the others goes into the one of these that it is most like, by the cosine of the keys of `site`, averaged over heads; that
    becomes the mean of them all, or, `summed`, itself plus the mean of what goes into it. Features are gathered so as they leave the layer
    of `site`, in front of the model's own projection.
    """

    site: str
    count: Count
    summed: bool


@dataclass(frozen=True)
class Crops:
    """Pictures that are one image, a thumbnail and rows x columns of crops behind it, and share what is kept (HiRED, Arif et al. 2025).

    Of the number that a `Count` of all their patches gives, the thumbnail keeps the share `thumbnail`, at most all of its own. Each crop
    gets of the rest what it has of the share 1 - `thumbnail` of the thumbnail's patches that have the greatest `early` score, where the
    crop lies in the thumbnail or, with bands, in as many consecutive patches.
    """

    early: Received
    rows: int
    columns: int
    thumbnail: float
    bands: bool

    @property
    def pictures(self) -> int:
        """How many pictures an image is."""
        return 1 + self.rows * self.columns

    def numbers(self, count: Count, patches: int) -> tuple[int, int, int]:
        """(kept of the thumbnail, kept of all crops, patches of the thumbnail that say where), of `patches` in each picture."""
        every = self.pictures * patches
        budget = count.number(every, every)
        thumbnail = min(int(budget * self.thumbnail), patches)
        return thumbnail, min(budget - thumbnail, every - patches), int(patches * (1 - self.thumbnail))


@dataclass(frozen=True)
class Select:
    """Some tokens leave a stack, the others go on.

    stack, layer: where; place: in front of the layer, or "between" its attention and its MLP, behind the attention's residual.
    candidates: what may leave, the "patches" of a grid (tokens around it stay: CLS, registers, a detector's) or a text's "visual" ones.
    fuse: those that leave become one more token behind the patches, the sum of each times its score (not divided by the sum of these).
    contextual: those that leave are gathered into some of them, which stay too. crops: several pictures are one image. Both for visual
    tokens that a vision tower scores.
    """

    stack: int
    layer: int
    place: Place
    candidates: Literal["patches", "visual"]
    count: Count
    rule: Received | Spread | Drawn | Handed | Pooled
    by: str
    fuse: bool = False
    contextual: Contextual | None = None
    crops: Crops | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """The sites whose attention is read."""
        late = self.rule.sites if isinstance(self.rule, Received) else ()
        return (*late, *(self.crops.early.sites if self.crops is not None else ()))


@dataclass(frozen=True)
class Criteria:
    """What makes tokens go together in multi-criteria fusion, as temperatures: likeness, little attention received, small size (MCTF)."""

    similar: float
    informative: float
    sized: float

    def number(self, count: float, tokens: int, protected: int) -> int:
        """How many of `tokens` are fused away: `count`, or the share of those behind CLS that it is; of those not `protected` half at most,
        and ten stay."""
        wanted = int((tokens - 1) * count) if isinstance(count, float) else count
        return max(0, min(wanted, (tokens - protected) // 2, tokens - FEWEST))


# So many tokens are left by fusion in the authors' code.
FEWEST = 10


@dataclass(frozen=True)
class Merge:
    """Tokens that are alike are merged between the attention and the MLP of one layer of a stack (ToMe, Bolya et al. 2023).

    The tokens at even places are matched with those at odd ones by the cosine of the keys of `site`, averaged over heads; the closest
    `count` pairs, at most (N - prefix - suffix) // 2 of N tokens, become the mean of the patches that they stand for. Left are the other
    even tokens, then the odd ones; the first `prefix` and the last `suffix` are never merged and stay at the ends. proportional: the
    attention of later layers has log(size) of each key added to its score (`sized`). Where a token-shaped tensor is read in full, each
    place holds the token that it went into.

    criteria: tokens are fused in front of the layer instead, each weighted by what it receives in that layer times its size, and matched by
    these (`rewrite.tokens.fusing`). The layer's attention is that of the tokens as they were (one step ahead): keys add up the attention
    that they received, to the values of the fused tokens, and its rows are averaged as the tokens are.
    """

    stack: int
    layer: int
    site: str
    count: int | float
    prefix: int
    proportional: bool
    by: str
    criteria: Criteria | None = None
    suffix: int = 0

    def number(self, present: int) -> int:
        """How many tokens are merged away, of `present` with the protected ones."""
        if self.criteria is not None:
            return self.criteria.number(self.count, present, self.prefix + self.suffix)
        return max(0, min(int(self.count), (present - self.prefix - self.suffix) // 2))


TokenOperation = Exit | Select | Merge

# The operand of a site behind a choice that keeps another number in each row: bool [B, Nk], which keys are no padding of that.
PRESENT = "present"

# The operand of a site behind a merge: log of the number of patches that each key stands for, [B, Nk].
LOG_SIZE = "log_size"


def first_layer(operation: TokenOperation) -> int:
    """The first layer whose attention does not see every token any more, or not as it was."""
    between = isinstance(operation, Merge) and operation.criteria is None
    return operation.layer + (between or (isinstance(operation, Select) and operation.place == "between"))


def of_visual(operation: TokenOperation) -> bool:
    """Whether visual tokens of a text leave, and not patches of a grid."""
    return isinstance(operation, Exit) or (isinstance(operation, Select) and operation.candidates == "visual")
