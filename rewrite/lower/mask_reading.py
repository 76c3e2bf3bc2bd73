"""Linear attention whose mask is one tensor of all pairs, with the mask read as the graph makes it, so that it has a state form.

Padding, order, and the segments of packed rows are then known before a call runs, on every device; the tensor itself is computed no more
where nobody else reads it. Sites behind a KV cache keep it, since their positions begin at a number that is data.
"""

from __future__ import annotations

from dataclasses import replace

import sympy
from torch import fx

import codegen
from rewrite.ir.expression import conjuncts, letters
from rewrite.ir.operations import Attend, Operation
from rewrite.ir.site import Site
from rewrite.recognise.mask_terms import mask_terms
from rewrite.recognise.operators import value_of
from rewrite.recognise.region import Operand, Region

# By name, the tensor that a mask reads, and the letters of the axes that it reads of its four.
Given = dict[str, tuple[fx.Node, str]]


def read_masks(site: Site, region: Region) -> tuple[Site, Given]:
    """The site with such masks read, and what they read; as it is where that gives no operation a state form."""
    given: Given = {}

    def read(operation: Operation) -> Operation:
        if not isinstance(operation, Attend) or codegen.has_triton_state(operation) is None:
            return operation
        for term in conjuncts(operation.mask):
            name = _tensor_of_pairs(term, region)
            found = None if name is None else mask_terms(region.tensors[name].node, name)
            if found is None:
                continue
            others = [each for each in conjuncts(operation.mask) if each != term]
            simpler = replace(operation, mask=sympy.And(*others, found.mask))
            if codegen.has_triton_state(simpler) is None:
                given.update(found.tensors)
                return simpler
        return operation

    if site.cached or site.dims["Nq"] != site.dims["Nk"]:
        return site, {}
    body = replace(site.body, operations=tuple(map(read, site.body.operations)))
    return (replace(site, body=body), given) if given or body != site.body else (site, {})


def _tensor_of_pairs(term: sympy.Basic, region: Region) -> str | None:
    """The name of the tensor [B or 1, 1, Nq, Nk] whose entries are the term."""
    read = term.lhs if isinstance(term, sympy.Ne) and term.rhs == 0 else None
    if not isinstance(read, sympy.Indexed) or letters(read.indices) not in ("ij", "bij"):
        return None
    name = str(read.base.label)
    return name if name in region.tensors and _lies_as_given(region.tensors[name], len(read.indices)) else None


def _lies_as_given(operand: Operand, axes: int) -> bool:
    """Whether the axes that are read are the last of four, in order."""
    layout = operand.layout
    whole = layout.split is None and layout.merged is None and not layout.appended and layout.order == tuple(range(axes))
    left_out = (1,) if axes == 3 else (0, 1)
    return whole and value_of(operand.node).dim() == 4 and tuple(sorted(layout.squeezed)) == left_out
