"""What of a graph a recogniser has to account for: every softmax-like node whose result weights something.

Written without the recogniser's own code, so that it cannot overlook what that overlooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

# Operators behind which weights are still weights, in another order, type or scale, or mixed over heads.
CARRIES_ON = frozenset(
    (
        "view", "reshape", "permute", "transpose", "expand", "unsqueeze", "squeeze", "flatten", "unflatten", "movedim", "swapaxes", "mT",
        "T", "contiguous", "clone", "to", "float", "half", "bfloat16", "double", "type", "type_as", "getitem", "chunk", "split", "narrow",
        "roll", "dropout", "masked_fill", "where", "nan_to_num", "add", "iadd", "sub", "mul", "imul", "div", "truediv", "itruediv",
        "conv2d", "linear",
    )
)  # fmt: skip
CONTRACTS = frozenset(("matmul", "bmm", "einsum", "baddbmm"))


def name_of(node: fx.Node) -> str:
    """The bare name of what a node calls: "softmax" for `torch.softmax`, `F.softmax`, `Tensor.softmax` and `aten._softmax`."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return name.removesuffix(".default").removesuffix(".int").split(".")[-1].strip("_")


def normalises(node: fx.Node) -> bool:
    """A softmax, or a call that has one inside."""
    if not node.op.startswith("call"):
        return False
    name = name_of(node)
    return ("softmax" in name and "log" not in name) or "attention" in name


def products(node: fx.Node) -> list[fx.Node]:
    """The contractions that a normaliser's result weights something in; the node itself where it is a whole attention."""
    if "attention" in name_of(node):
        return [node]
    found: dict[fx.Node, None] = {}
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if name_of(user) in CONTRACTS:
                found[user] = None
            elif name_of(user) in CARRIES_ON and user not in seen:
                seen.add(user)
                stack.append(user)
    return list(found)


def inside(output: fx.Node, operands: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes between a region's operands, left out, and its output."""
    borders = set(operands)
    stack, seen = [output], {output}
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in borders and source not in seen:
                seen.add(source)
                stack.append(source)
    return seen


def unaccounted(graph: fx.Graph, regions: Iterable[set[fx.Node]], named: Iterable[str]) -> Iterator[str]:
    """Normalisers that weight something outside every region, and whose names are none of `named`, those of the near misses."""
    taken = {node for region in regions for node in region}
    told = set(named)
    for node in graph.nodes:
        if normalises(node) and node.name not in told and node not in taken:
            astray = [product.name for product in products(node) if product not in taken]
            if astray:
                yield f"{node.name} weights {', '.join(astray)} and is in no region and no near miss"
