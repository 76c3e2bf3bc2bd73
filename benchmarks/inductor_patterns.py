"""How many attentions of a captured graph Inductor's own attention patterns replace, without generating any code."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx


def replaced_by_inductor(module: fx.GraphModule, inputs: Sequence[Any]) -> int:
    """The number of attentions in a graph of Dynamo's that one of Inductor's patterns matches. Call it inside the torch.compile backend.

    All of Inductor's own pipeline runs up to the passes on the joint graph, which its attention patterns are part of; in the place of
    everything behind (scheduling, code generation) the graph is called as it is.
    """
    before = counters["inductor"]["fuse_attention"]
    # Inductor changes the graph it is given.
    compile_fx(copy.deepcopy(module), list(inputs), inner_compile=_as_it_is)
    return counters["inductor"]["fuse_attention"] - before


def _as_it_is(module: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
    return make_boxed_func(module.forward)
