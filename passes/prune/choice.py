"""What selecting passes share: whether the tokens of a stack may leave, who sees fewer then, and what every other site is told."""

from __future__ import annotations

from rewrite.ir import CHANGES_NOTHING, Count, Fits, Merge, Program, Received, Select, Site, first_layer

# A later call reads its prompt's tokens from the KV cache: they were chosen when the prompt ran.
CHOSEN_BEFORE = f"its visual tokens were chosen when the prompt ran, and going on from its KV cache {CHANGES_NOTHING}"


def keeps_all(by: str) -> str:
    """The reason of a site where a setting keeps every token."""
    return f"{by} keeps every token, which {CHANGES_NOTHING}"


def applied(program: Program, fits: Fits, stack: int, selections: tuple[Select, ...] | tuple[Merge, ...] | str, by: str) -> Program:
    """The selections put into one stack of a program, or why they are not (a reason, or a later site that cannot follow).

    Every site of the stack is told: touched where it sees fewer tokens or is read, declined elsewhere. Tokens cannot leave some of the
    later layers only: a site among these that does not fit keeps them everywhere.
    """
    sites = tuple(site for site in program.sites if site.stack == stack)
    against = {site.name: fits.reason_against(site) for site in sites}
    otherwise, touched = selections if isinstance(selections, str) else "", tuple[Site, ...]()
    if not isinstance(selections, str):
        first = min(map(first_layer, selections))
        read = {name for one in selections for name in ((one.site,) if isinstance(one, Merge) else one.reads)}
        touched = tuple(site for site in sites if site.layer >= first or site.name in read)
        blocking = next((site for site in touched if against[site.name] is not None), None)
        if blocking is not None:
            otherwise = f"the tokens would have to leave {blocking.name} too, and there {against[blocking.name]}"
            touched = ()
        else:
            otherwise = f"it comes before layer {first}, the first that does not see every token"
    for site in sites:
        if site not in touched:
            program = program.with_declined(site, by, against[site.name] or otherwise)
    return program.with_selections(selections, touched) if touched and not isinstance(selections, str) else program


def stacks(program: Program) -> list[int]:
    """The stacks of a program, in order."""
    return sorted({site.stack for site in program.sites})


def at_layer(program: Program, stack: int, layer: int) -> Site | None:
    """The site of one layer of a stack; None where it is in another graph."""
    return next((site for site in program.sites if (site.stack, site.layer) == (stack, layer)), None)


def chosen_by_text(program: Program, stack: int, layer: int, read: int, count: Count, by: str) -> tuple[Select, ...] | str:
    """Visual tokens leave in front of `layer`, by the attention of the last query in layer `read`; or why they do not."""
    sites = [site for site in program.sites if site.stack == stack]
    source = at_layer(program, stack, read)
    depth = max(site.depth for site in sites)
    if not any(site.layout.visual for site in sites):
        return "no visual tokens were found among its keys"
    if all(site.cached for site in sites) and (source is None or not source.layout.visual or source.dims["Nq"] == 1):
        return CHOSEN_BEFORE
    if layer >= depth:
        return f"its stack has {depth} layers, and visual tokens that leave in front of layer {layer} leave none of them"
    if source is None:
        return f"layer {read}, whose attention is read, is in another graph of the call"
    return (Select(stack, layer, "before", "visual", count, Received((source.name,), (-1, None)), by),)


# One token could be meant for all of them, 1 for 1.0.
AMOUNT = "a share above 0.0 and at most 1.0, or a number of tokens, at least 2"


def is_amount(keep: float) -> bool:
    """True for what says how many tokens stay: a share of them, or their number."""
    return 0.0 < keep <= 1.0 if isinstance(keep, float) else keep >= 2


def is_everything(keep: float) -> bool:
    """True for the share 1.0; the number 1 is one token."""
    return isinstance(keep, float) and keep == 1.0


def reason_against_entry(program: Program, stack: int, entry: Site | None) -> str | None:
    """Why no visual token can be kept from entering a stack, or None; `entry`: the site of its first layer."""
    sites = [site for site in program.sites if site.stack == stack]
    if not any(site.layout.visual for site in sites):
        return "no visual tokens were found among its keys"
    if all(site.cached for site in sites) and (entry is None or not entry.layout.visual or entry.dims["Nq"] == 1):
        return CHOSEN_BEFORE
    return None if entry is not None else "the first layer of its stack is in another graph of the call"
