"""A rewritten site run by the operators that a rewritten graph calls."""

from __future__ import annotations

import torch

from codegen.operator import attend
from rewrite.ir import Attend, PlainOperation, Site
from rewrite.ir.semantics import evaluate_operation
from rewrite.lower.functions import plain_operation


def lowered(rewritten: Site, operands: dict[str, torch.Tensor]) -> torch.Tensor:
    """The site's output by the operators that a graph runs."""
    values = dict(operands)
    for operation in rewritten.body.operations:
        if isinstance(operation, Attend):
            query, key, value = (values[name] for name in (operation.query, operation.key, operation.value))
            values[operation.result] = attend(operation, query, key, value, values)
        elif isinstance(operation, PlainOperation):
            reads = operation.reads()
            first, *others = (values[name] for name in reads.values())
            values[operation.result] = plain_operation(first, type(operation).__name__, tuple(reads), tuple(others), operation.facts())
        else:
            evaluate_operation(operation, values)
    return values[rewritten.body.result]
