"""What passes share that choose among the patches of whole pictures, before these enter a language model as its visual tokens."""

from __future__ import annotations

from collections.abc import Callable

from passes.prune.choice import applied, at_layer, keeps_all, reason_against_entry, stacks
from rewrite.ir import APART, Count, Fits, Handed, Pooled, Program, Received, Select, Site

# What a pass makes of one vision tower: (program, the last site that patches went through, stack of the text) -> what stays, or why all do.
OfPictures = Callable[[Program, Site, int], Select | str]

# What is asked of the sites of a vision tower that are read.
READ = Fits(kinds=frozenset({"self"}), causal=False, grid=True)


def applied_by_pictures(program: Program, fits: Fits, by: str, choose: OfPictures | None) -> Program:
    """Visual tokens kept from entering a language model, as patches of the pictures that they come from; choose: None keeps all.

    Where patches leave their tower in this graph and enter the text in a later one, the choice is made here for there.
    """
    for stack in stacks(program):
        program = applied(program, fits, stack, _selections(program, stack, by, choose), by)
        tower = next((site for site in program.sites if site.stack == stack and site.leaves), None)
        if tower is not None and choose is not None:
            handed = _chosen(program, tower, tower, stack, choose)
            program = program.with_declined(tower, by, handed) if isinstance(handed, str) else program.with_choice(handed)
    return program


def received_from_cls(program: Program, last: Site, first: int | None, without_cls: bool = False) -> Received | str:
    """The attention of CLS in the layers `first` (None: the last alone) to the last that patches went through, or why there is none.

    without_cls: where there is no CLS token, the attention of all tokens will do.
    """
    if not last.layout.prefix and not without_cls:
        return f"the vision tower of {last.name} has no CLS token in front of its patches"
    layers = range(last.layer if first is None else first, last.layer + 1)
    read = tuple(site.name for site in program.sites if site.stack == last.stack and site.layer in layers)
    if not read:
        return f"its visual tokens went through the layers 0 to {last.layer} of the vision tower, none of which is layer {first} or later"
    return Received(read, (0, 1 if last.layout.prefix else None))


def _selections(program: Program, stack: int, by: str, choose: OfPictures | None) -> tuple[Select, ...] | str:
    entry = at_layer(program, stack, 0)
    if choose is None:
        return keeps_all(by)
    if reason := reason_against_entry(program, stack, entry):
        return reason
    assert entry is not None
    if entry.chosen is not None:
        handed = (Select(stack, 0, "before", "visual", Count(1.0), Handed(), by),)
        return handed if entry.chosen == by else f"{entry.chosen} chose among its visual tokens where their vision tower ran"
    last = next((site for site in program.sites if site.name == entry.pictured), None)
    if last is None:
        told = f"its visual tokens are not the patches of a vision tower {APART}, one by one and in order"
        return told if entry.unpictured is None else f"{told}: {entry.unpictured}"
    chosen = _chosen(program, last, entry, stack, choose)
    return chosen if isinstance(chosen, str) else (chosen,)


def _chosen(program: Program, last: Site, held: Site, stack: int, choose: OfPictures) -> Select | str:
    """What stays of the patches behind `last`; held: the site that says how they are held, of the tower or of the text."""
    selection = choose(program, last, stack)
    if isinstance(selection, str):
        return selection
    if held.relaid and (selection.contextual is not None or isinstance(selection.rule, Pooled)):
        return (
            f"the patches of {last.name} are laid out anew before they are visual tokens, and it makes new features of them, which have no "
            "place there; use a pass that keeps some as they are"
        )
    read = [site for site in program.sites if site.name in selection.reads]
    return next((f"{site.name} is read, and {reason}" for site in read if (reason := READ.reason_against(site))), selection)
