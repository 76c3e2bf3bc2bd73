"""A program: the sites of one captured graph, and the token operations between them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import sympy

from rewrite.ir.errors import NotApplicableError
from rewrite.ir.expression import B, J, read
from rewrite.ir.operations import Attend
from rewrite.ir.selection import LOG_SIZE, PRESENT, Exit, Handed, Merge, Pooled, Select, TokenOperation, first_layer, of_visual
from rewrite.ir.site import Site


@dataclass(frozen=True)
class Program:
    """Sites in program order and token operations: visual tokens that leave (exits), tokens that are chosen among or
    merged (selections).

    choices: selections among the patches of pictures that leave their vision tower in this graph, and are a text's visual tokens later on.

    by_row: stacks in which each row of a batch keeps a number of visual tokens of its own, see `counted`.

    touched: (site name, pass text) for every site that a pass rewrote. declined: (site name, pass text, reason).
    """

    sites: tuple[Site, ...]
    exits: tuple[Exit, ...] = ()
    selections: tuple[Select | Merge, ...] = ()
    choices: tuple[Select, ...] = ()
    by_row: frozenset[int] = frozenset()
    touched: tuple[tuple[str, str], ...] = field(default=())
    declined: tuple[tuple[str, str, str], ...] = field(default=())

    def with_site(self, site: Site, by: str) -> Program:
        """This program with the site of that name replaced."""
        sites = tuple(site if old.name == site.name else old for old in self.sites)
        return replace(self, sites=sites, touched=(*self.touched, (site.name, by)))

    def with_exits(self, exits: tuple[Exit, ...], sites: tuple[Site, ...]) -> Program:
        """This program with more exits of one pass in one stack, which change the given sites.

        Those behind an exit that is sure have no visual tokens any more.
        """
        sure = [one.layer for one in exits if one.when is None]
        names = {site.name for site in sites if sure and site.layer >= min(sure)}
        left = tuple(replace(site, layout=replace(site.layout, visual=False)) if site.name in names else site for site in self.sites)
        touched = tuple((site.name, exits[0].by) for site in sites)
        return replace(self, sites=left, exits=self.exits + exits, touched=self.touched + touched)

    def with_selections(self, selections: tuple[Select | Merge, ...], sites: tuple[Site, ...]) -> Program:
        """This program with more selections of one pass in one stack, which change the given sites or read them.

        Where tokens have left, the others lie on no grid any more.
        """
        first = min(map(first_layer, selections))
        names = {site.name for site in sites if site.stack == selections[0].stack and site.layer >= first}
        thinned = tuple(replace(site, layout=replace(site.layout, grid=None)) if site.name in names else site for site in self.sites)
        touched = tuple((site.name, selections[0].by) for site in sites)
        return replace(self, sites=thinned, selections=self.selections + selections, touched=self.touched + touched)

    def towers(self) -> frozenset[str]:
        """The last sites, in vision towers, of the patches that selections choose among as visual tokens of a text."""
        chosen = self._chosen_apart()
        return frozenset(site.pictured for site in self.sites if site.pictured is not None and site.stack in chosen)

    def _chosen_apart(self) -> frozenset[int]:
        """The stacks whose visual tokens are chosen as the patches that they were."""
        own = {(site.stack, site.name) for site in self.sites}
        selects = [one for one in self.selections if isinstance(one, Select)]
        apart = (one for one in selects if isinstance(one.rule, Handed | Pooled) or any((one.stack, name) not in own for name in one.reads))
        return frozenset(one.stack for one in apart)

    def with_choice(self, choice: Select) -> Program:
        """This program with one more choice for a later graph. Raises `NotApplicableError` where pictures were chosen from before."""
        if self.choices:
            raise NotApplicableError(
                f"{self.choices[0].by} and {choice.by} both choose among the patches of whole pictures; use one of them"
            )
        return replace(self, choices=(choice,))

    def token_operations(self, stack: int | None = None) -> tuple[TokenOperation, ...]:
        """What becomes of the tokens of a stack (of all stacks), in the order in which they meet it."""
        named: tuple[TokenOperation, ...] = (*self.selections, *self.exits)
        return tuple(sorted((one for one in named if stack in (None, one.stack)), key=lambda one: (one.stack, one.layer, first_layer(one))))

    def sized(self) -> Program:
        """This program with every site behind a proportional merge counting its keys by their size: log(size) is added to its score.

        It is done behind all passes, so that none of them takes it for the model's own. Raises `NotApplicableError` for a site that passes
        made something else of than one softmax attention.
        """
        merges = [one for one in self.selections if isinstance(one, Merge) and one.proportional]
        return replace(self, sites=tuple(self._sized(site, merges) for site in self.sites))

    def counted(self, uneven: bool) -> Program:
        """This program knowing in which stacks each row keeps a number of visual tokens of its own.

        That is where the data decide for each whether its tokens leave, or patches that were laid out anew are chosen among, and everywhere
        if rows hold different numbers, `uneven`.
        """
        decided = {one.stack for one in self.exits if one.when is not None}
        relaid = self._chosen_apart() & {site.stack for site in self.sites if site.relaid}
        asked = {one.stack for one in self.token_operations() if of_visual(one)}
        return replace(self, by_row=frozenset(asked if uneven else asked & (decided | relaid)))

    def padded(self, several: Collection[int]) -> Program:
        """This program with every site behind a choice that keeps another number in each row hiding the keys that pad rows with fewer.

        several: the stacks that hold visual tokens of more than one row. Done behind all passes, as `sized`, with the same refusal.
        """
        padding = [one for one in self.token_operations() if not isinstance(one, Merge) and self._pads(one, several)]
        return replace(self, sites=tuple(self._padded(site, padding) for site in self.sites))

    def _pads(self, one: Exit | Select, several: Collection[int]) -> bool:
        """Whether rows may keep different numbers of tokens in one operation."""
        if of_visual(one):
            return one.stack in self.by_row and one.stack in several
        return isinstance(one, Select) and one.count.mass is not None

    def hiding(self, names: Collection[str]) -> Program:
        """This program with the named sites hiding keys that are not present: earlier calls took them out of a KV cache of fixed length, or
        padded a row of a cache.

        Done behind all passes, as `padded`.
        """
        hiding = {site.name for site in self.sites if site.name in names and PRESENT not in site.operands}
        return replace(self, sites=tuple(_present_alone(site, site.attend) if site.name in hiding else site for site in self.sites))

    def _sized(self, site: Site, merges: list[Merge]) -> Site:
        attend = self._one_attention(site, merges, "the sizes of merged tokens; use one of them, or proportional=False")
        if attend is None:
            return site
        sized = replace(site, operands=(*site.operands, LOG_SIZE))
        return sized.with_operations(replace(attend, score=attend.score + read(LOG_SIZE, B, J)))

    def _padded(self, site: Site, padding: list[Exit | Select]) -> Site:
        wanted = (
            "rows that keep different numbers of tokens; use one of them, or have every row keep as many: by no mass=, by a layer that is "
            "given, and by batches whose rows hold the same number of visual tokens"
        )
        attend = self._one_attention(site, padding, wanted)
        return site if attend is None else _present_alone(site, attend)

    def _one_attention(self, site: Site, operations: Sequence[TokenOperation], wanted: str) -> Attend | None:
        """The attention of a site behind some of the operations, None where it is in front; it must be one softmax attention."""
        before = [one for one in operations if one.stack == site.stack and first_layer(one) <= site.layer]
        if not before:
            return None
        attend = site.body.operations[0]
        if len(site.body.operations) != 1 or not isinstance(attend, Attend) or attend.normaliser != "softmax" or attend.score_mix:
            others = ", ".join(by for by in self.passes_of(site) if by != before[0].by)
            raise NotApplicableError(
                f"{site.name}: {others} makes something else of it than one softmax attention, in which {before[0].by} has no place for "
                f"{wanted}"
            )
        return attend

    def with_declined(self, site: Site, by: str, reason: str) -> Program:
        """This program, noting why a pass left a site alone."""
        return replace(self, declined=(*self.declined, (site.name, by, reason)))

    def passes_of(self, site: Site) -> tuple[str, ...]:
        """The passes that rewrote a site, in order."""
        return tuple(by for name, by in self.touched if name == site.name)


def _present_alone(site: Site, attend: Attend) -> Site:
    """The site, whose one attention that is, hiding the keys that are not present."""
    present = replace(site, operands=(*site.operands, PRESENT))
    return present.with_operations(replace(attend, mask=sympy.And(attend.mask, sympy.Ne(read(PRESENT, B, J), 0))))
