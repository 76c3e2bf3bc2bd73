"""What a pass is: a frozen dataclass of facts and one method from program to program."""

from __future__ import annotations

import dataclasses
import typing
from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import sympy
import torch

from rewrite.ir.errors import PassError
from rewrite.ir.fitting import Fitting
from rewrite.ir.operations import Parameter
from rewrite.ir.parameters import converted
from rewrite.ir.program import Program
from rewrite.ir.site import Site

Family = Literal["prune", "redistribute", "sparsify", "linearize"]

# In the reason of a site that is left alone because the pass, as set, is the identity there; a pass list of such is no error.
CHANGES_NOTHING = "changes nothing"

# In the reason of a site that is left alone because what the pass reads is elsewhere: a call that the analysis saw whole came in parts.
APART = "in this graph"

# In the reason of a site that is left alone because of the kind of its KV cache.
FIXED = "its KV cache has a fixed length (a static cache), of which a part is filled"

# The order in which passes run, whatever order they are asked in: later families build on what earlier ones left.
PHASES: tuple[frozenset[Family], ...] = (
    frozenset({"prune"}),
    frozenset({"redistribute"}),
    frozenset({"sparsify", "linearize"}),
)


@dataclass(frozen=True)
class Fits:
    """The sites a pass can work on; whatever is not asked for here is allowed.

    causal: required value, or None for either. grid, visual, hidden: the site must have a 2-D grid, visual tokens among its keys, the
    hidden states of its layer's input. frames: a 3-D grid, of a video's frames, is fine too. followed: so are tokens behind the grid.
    cached: so are sites that read a KV cache. unusual: so are sites that are not softmax attention alone: mixed heads, sink logits, other
    normalisers, changed weights (`Attend.unusual`); the pass must keep these parts. fixed: so are sites whose KV cache has a fixed length;
    the pass must take out tokens alone and leave what an attention computes as it is. A pass for cross-attention takes keys as they come.
    """

    kinds: frozenset[str] = frozenset({"self"})
    causal: bool | None = None
    grid: bool = False
    frames: bool = False
    followed: bool = False
    visual: bool = False
    hidden: bool = False
    cached: bool = True
    unusual: bool = False
    fixed: bool = False

    def reason_against(self, site: Site) -> str | None:
        """Why a site does not fit, in words, or None."""
        checks: tuple[tuple[bool, str], ...] = (
            (site.kind not in self.kinds, f"it is {site.kind}-attention, the pass is for {' or '.join(sorted(self.kinds))}-attention"),
            (site.fixed and not self.fixed and "cross" not in self.kinds, FIXED),
            (self.causal is True and not is_causal(site), "it is not causal"),
            (self.causal is False and is_causal(site), "it is causal, and the method is defined for non-causal attention"),
            (self.grid and site.layout.grid is None, "its tokens lie on no grid that was found"),
            (self.grid and not self.frames and len(site.layout.grid or ()) > 2, "its tokens lie on a grid of frames, not of one picture"),
            (self.grid and self._partial(site) is not None, f"{self._partial(site)}"),
            (self.visual and not site.layout.visual, "no visual tokens were found among its keys"),
            (self.hidden and "hidden" not in site.operands, "the hidden states that enter its layer were not found"),
            (not self.cached and site.cached, "it reads a KV cache"),
            (not self.unusual and bool(site.unusual), f"it {', '.join(site.unusual)}; the pass is for plain softmax attention"),
            (site.dropout > 0, f"its attention dropout is {site.dropout:g} in training; set it to 0, the kernels have none"),
            (site.map_read, "its attention map is read elsewhere in the model (output_attentions?)"),
        )
        return next((reason for failed, reason in checks if failed), None)

    def _partial(self, site: Site) -> str | None:
        return None if self.followed and site.layout.partial == site.layout.followed else site.layout.partial


def is_causal(site: Site) -> bool:
    """True where no query sees a later key: by the mask, or as one unmasked query at the end of a KV cache, which has no later key."""
    one_step = site.cached and site.dims["Nq"] == 1 and all(attend.mask == sympy.true for attend in site.body.attends())
    return site.causal or one_step


@dataclass(frozen=True)
class AttentionInputs:
    """What a pass's `reference` is given: a site's tensors as the model has them.

    query [B, H, Nq, D], key [B, H, Nk, D], value [B, H, Nk, Dv] (heads repeated where the model shares them), logits [B, H, Nq, Nk]
    (scaled and biased scores, -inf where masked), site as recognised, hidden [B, Nk, C] or None, visual [B, Nk] bool or None (of every
    key, those in a KV cache included; queries are the last Nq of them), parameters: what the pass added, by name. input [B, N, C] or
    None: what queries and keys were projected from.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    logits: torch.Tensor
    site: Site
    hidden: torch.Tensor | None = None
    visual: torch.Tensor | None = None
    parameters: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    input: torch.Tensor | None = None


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes: derive a frozen dataclass, its fields being the parameters.

    name: how it is written in a pass list. family: prune, redistribute, sparsify or linearize; it decides when the pass runs.
    paper: where the method is from. formula: what it computes, one line. fits: the sites it can work on. excludes: names of passes that
    cannot hold on the same model. training_free: useful without training. fitting: how the parameters it adds are trained (`rewrite.fit`).
    """

    name: ClassVar[str]
    family: ClassVar[Family]
    paper: ClassVar[str]
    formula: ClassVar[str]
    training_free: ClassVar[bool] = True
    fits: ClassVar[Fits] = Fits()
    excludes: ClassVar[tuple[str, ...]] = ()
    fitting: ClassVar[Fitting] = Fitting()

    def check(self) -> None:  # noqa: B027  (a pass without parameters has nothing to check)
        """Raise `PassError` where a parameter is out of its range. Called at construction."""

    def __post_init__(self) -> None:
        """Parameters brought to their types and checked; `PassError` where they are of another type or out of range."""
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, converted(self.name, field.name, getattr(self, field.name), hints[field.name]))
        self.check()

    def require(self, holds: bool, parameter: str, range_: str) -> None:
        """`PassError` that names the parameter, its value and its range, unless `holds`."""
        if not holds:
            raise PassError(f"{self.name}: {parameter}={getattr(self, parameter)!r} is out of range; it must be {range_}")

    @classmethod
    def identity(cls) -> Self | None:
        """An instance that changes nothing, or None where the method has no such setting."""
        return None

    def adds_parameters(self) -> bool:
        """True where the pass, as set, adds parameters to the model."""
        return False

    def declines(self, site: Site) -> str | None:
        """Why this pass, as set, leaves a fitting site alone, in words, or None."""
        return None

    def transform(self, site: Site) -> Site:
        """The rewritten site. Called for each site that fits and is not declined."""
        raise TypeError(f"{type(self).__name__} defines neither transform() nor apply()")

    def apply(self, program: Program) -> Program:
        """The rewritten program: `transform` on every site that fits, a stated reason for every other one."""
        for site in program.sites:
            reason = self.fits.reason_against(site) or self.declines(site)
            if reason is not None:
                program = program.with_declined(site, str(self), reason)
                continue
            changed = self.transform(site)
            program = (
                program.with_site(changed, str(self))
                if changed != site
                else program.with_declined(site, str(self), f"the setting {CHANGES_NOTHING} here")
            )
        return program

    def reference(self, attention: AttentionInputs) -> torch.Tensor:
        """The method's output at one site in plain PyTorch, [B, H, Nq, Dv]: what the rewritten site is judged against."""
        raise TypeError(f"{type(self).__name__} defines no reference()")

    def attention_map(self, attention: AttentionInputs) -> torch.Tensor:
        """The map [B, H, Nq, Nk] that the pass's parameters make, in plain PyTorch and with gradients for them.

        It is what fitting brings close to the original's map, for passes whose `fitting` compares maps.
        """
        raise TypeError(f"{type(self).__name__} defines no attention_map(), and its fitting compares maps")

    def __str__(self) -> str:
        """The pass as text, its own constructor: only the parameters that differ from their defaults."""
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    @classmethod
    def parameters(cls) -> tuple[dataclasses.Field[Any], ...]:
        """The pass's parameters, in order; each has its help text in ``field.metadata["help"]`` where one was given."""
        return dataclasses.fields(cls)


def parameter(default: Any, help_: str) -> Any:
    """A pass's parameter with its default and one line of help."""
    return dataclasses.field(default=default, metadata={"help": help_})


__all__ = ["APART", "FIXED", "PHASES", "AttentionInputs", "Family", "Fits", "Fitting", "Parameter", "Pass", "is_causal", "parameter"]
