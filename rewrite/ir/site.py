"""An attention site: what was recognised, where, and what it computes now."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import sympy
from sympy.logic.boolalg import Boolean

from rewrite.ir.expression import NK, NQ, QK, conjuncts
from rewrite.ir.operations import Attend, Body, Operation, Parameter

Kind = Literal["self", "cross", "channel"]


@dataclass(frozen=True)
class TokenLayout:
    """How a site's query tokens lie.

    grid: (H, W) or (T, H, W) of the stream that the tokens belong to; None where none was found. raster: they are in row-major order.
    prefix, suffix: tokens in front of the grid (CLS, registers), and behind it.
    visual: True where the sequence holds visual tokens among text, at positions known when the model runs.
    window: the part of the grid that attends to itself, where that is not all of it; the sequence is then one window. partition: whether
    windows are contiguous, or take every n-th position of the grid (a "grid"). shifted: the grid was rolled before it was cut.
    key_grid: the grid that keys lie on, in order and nothing around it, where it is another one (spatially reduced keys).
    """

    grid: tuple[int, ...] | None = None
    prefix: int = 0
    visual: bool = False
    window: tuple[int, ...] | None = None
    partition: Literal["window", "grid"] = "window"
    shifted: bool = False
    suffix: int = 0
    raster: bool = True
    key_grid: tuple[int, ...] | None = None

    @property
    def partial(self) -> str | None:
        """Why a site's sequence is not a prefix and the whole grid in order, in words; None where it is, or where no grid is known."""
        if self.window is not None:
            return f"it attends in {'dilated ' if self.partition == 'grid' else ''}windows of {_by(self.window)}"
        if not self.raster:
            return f"the tokens of its grid {_by(self.grid or ())} are not in row-major order"
        return self.followed

    @property
    def followed(self) -> str | None:
        """What follows the grid, in words; None where nothing does."""
        return f"{self.suffix} tokens follow its grid" if self.suffix else None

    def __str__(self) -> str:
        parts = [f"{self.prefix} prefix" if self.prefix else None, f"grid {_by(self.grid)}" if self.grid else None]
        parts += [f"{self.suffix} behind"] if self.suffix else []
        text = " + ".join(part for part in parts if part) or ("text with visual tokens" if self.visual else "sequence")
        kind = "dilated windows" if self.partition == "grid" else "windows"
        cut = [f"{kind} {_by(self.window)}"] if self.window else []
        cut += ["shifted"] * self.shifted + ["reordered"] * (not self.raster)
        return ", ".join((text, *cut))


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


@dataclass(frozen=True)
class Site:
    """One attention site.

    name: qualified name of the module it lies in. layer: its number among the sites of its stack, from 0. depth: how many there are.
    stack: number of the stack (sites whose tokens are of one stream: a vision tower, a language model).
    dims: sizes by name: B, H, Hkv, Nq, Nk, D, Dv (the traced values; for a symbolic size the value it was traced with).
    operands: the tensors that the body may read without computing them: "query", "key", "value", the score's and the mask's tensors,
        and where the site has them "hidden" [B, N, C] (the layer's input), "input" [B, N, C] (what queries and keys were projected from:
        that, normalised, in a pre-norm layer) and "visual" [B, N] (which new tokens are visual).
    cached: keys of earlier calls are read from a KV cache.
    fixed: keys go into a KV cache of fixed length, of which a part is filled; a site that is cached too reads all of it, so that its last
        key is not that of its last query.
    dropout: attention dropout that was active when the site was traced.
    map_read: the attention map is read elsewhere in the model too.
    hides_later: a mask tensor was found to hide every later key (a causal mask that the model builds itself).
    pictured: where the sequence holds visual tokens that are the patches of a vision tower, in order, picture by picture: the name of the
        last attention that they went through there. None otherwise.
    chosen: where a pass chose among these patches when the tower ran, in an earlier graph: that pass, as text.
    unpictured: where it holds visual tokens: why these are no patches to choose among, as far as that is known.
    leaves: the patches that leave this layer of a vision tower are one of the graph's results, one by one and in order.
    relaid: these patches (`pictured`, `leaves`) were laid out anew since, with other tokens between them or some of them cut off, so that
    they can leave and nothing else can take their place.
    """

    name: str
    layer: int
    depth: int
    stack: int
    kind: Kind
    body: Body
    dims: dict[str, int]
    layout: TokenLayout
    operands: tuple[str, ...]
    cached: bool = False
    dropout: float = 0.0
    map_read: bool = False
    hides_later: bool = False
    pictured: str | None = None
    chosen: str | None = None
    unpictured: str | None = None
    leaves: bool = False
    relaid: bool = False
    fixed: bool = False

    @property
    def attend(self) -> Attend:
        """The site as it was recognised or as the passes so far left it, where that is a single attention."""
        attends = self.body.attends()
        if len(attends) != 1:
            raise ValueError(f"{self.name} is made of {len(attends)} attentions, not one")
        return attends[0]

    @property
    def is_plain(self) -> bool:
        """One plain softmax attention (see `Attend.is_plain`) and nothing else."""
        return len(self.body.operations) == 1 and self.attend.is_plain

    @property
    def unusual(self) -> tuple[str, ...]:
        """What sets the site's attentions apart from plain softmax attention, groups aside: words that follow "it"."""
        return tuple(dict.fromkeys(said for attend in self.body.attends() for said in attend.unusual))

    @property
    def scale(self) -> sympy.Expr:
        """The factor of `qk` in the score."""
        return sympy.expand(self.attend.score).coeff(QK, 1)

    @property
    def causal(self) -> bool:
        """True where the mask lets no query see a later key (every query being aligned with the last keys, as with a KV cache)."""
        attends = self.body.attends()
        if self.hides_later:
            return True
        return any(is_causal_term(term) for term in conjuncts(attends[0].mask)) if attends else False

    def with_operations(self, *operations: Operation, parameters: tuple[Parameter, ...] = ()) -> Site:
        """This site computing something else."""
        return replace(self, body=Body(operations, self.body.parameters + parameters))


def is_causal_term(term: Boolean) -> bool:
    """True for  j <= i + c  with c <= 0 or c <= Nk - Nq, in any spelling sympy brings it to."""
    if not isinstance(term, sympy.Rel) or isinstance(term, sympy.Eq | sympy.Ne):
        return False
    slack = term.gts - term.lts
    names = {symbol.name for symbol in slack.free_symbols}
    if not {"i", "j"} <= names or not names <= {"i", "j", "Nq", "Nk"}:
        return False
    symbols = {symbol.name: symbol for symbol in slack.free_symbols}
    ahead = sympy.expand(slack - symbols["i"] + symbols["j"])
    aligned = sympy.expand(ahead - NK + NQ)
    # j < i + 1 is j <= i: positions are integers.
    most = 1 if isinstance(term, sympy.StrictLessThan | sympy.StrictGreaterThan) else 0
    return any(offset.is_number and bool(offset <= most) for offset in (ahead, aligned))
