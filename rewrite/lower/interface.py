"""What a rewritten graph takes and gives beside what was traced, and what it may ask for."""

from __future__ import annotations

from dataclasses import dataclass, field

from rewrite.ir.operations import Parameter


@dataclass(frozen=True)
class Extra:
    """A value that a rewritten graph takes beside the traced inputs.

    kind "parameter": the added parameter `name`. "positions", "length", "groups", "sinks", "state", "seen": from the note of the cache
    entry that is input `index`. "present": which tokens of that entry are no padding.
    "visual", "features": what an earlier graph of the call carried with the activation that is input `index`. "stay", "made": what was
    chosen of the pictures in it, see `Chosen`.
    """

    kind: str
    name: str = ""
    index: int = -1


@dataclass(frozen=True)
class Produced:
    """A value that a rewritten graph returns beside the traced outputs.

    "positions", "length", "padded", "groups" or "sinks" of the cache entries `outputs`; "state", "seen" and "held" of what stands for them
    (`codegen.recurrence`); "visual" and "features" of the activations `outputs`, "stay" and "made" of the pictures in them. "kept",
    "length" and "holders" of the tokens that `sites` see; "routed", what a router in front of one is given.
    """

    kind: str
    outputs: tuple[int, ...]
    sites: tuple[str, ...] = ()


@dataclass
class Allowed:
    """What a graph may ask of whoever runs it, and the parameters it asked for so far, by full name.

    data_sizes: it may read a number of tokens off the data; else it takes the most that there can be, and padding.
    """

    parameters: bool = False
    notes: bool = True
    data_sizes: bool = True
    added: dict[str, Parameter] = field(default_factory=dict)
