"""How an emitted kernel reads its tensors: their arguments, addresses, loads, and what expressions print them as.

A tensor read at the indices themselves is addressed as query and key are, and masked where the tile goes beyond them. One that is read at
expressions in the indices is addressed by their text, each clamped to its axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import sympy

from codegen.names import identifiers
from codegen.triton_printer import triton_text
from rewrite.ir.expression import I, Indices, J, letters, tensors_in
from rewrite.ir.operations import Attend

# Where a program owns queries and walks over keys: "tile" ([BLOCK_Q, BLOCK_K]) and "columns" ([BLOCK_K]) are loaded inside the loop,
# "rows" before it ([BLOCK_Q, 1]), "end" after it ([BLOCK_Q]). Where it owns keys: "tile" ([BLOCK_K, BLOCK_Q]) inside, "keys" before it
# ([BLOCK_K, 1]).
Part = Literal["tile", "columns", "rows", "end", "keys"]

# What a program owns a block of. Its block stands along the first axis of a tile, what it walks over along the second.
Owner = Literal["queries", "keys"]


def gathers(attend: Attend) -> bool:
    """Whether scores or weights read a tensor at an expression in positions, as relative positions are read."""
    return any(letters(indices) is None for indices in tensors_in(*attend.expressions()).values())


OWNED, WALKED = "[:, None]", "[None, :]"


def axis_names(indices: Indices) -> tuple[str, ...]:
    """What the axes of a tensor are called in a kernel's arguments: their letters, or their numbers."""
    return tuple(letters(indices) or "") if letters(indices) is not None else tuple(str(place) for place in range(len(indices)))


class KernelReads:
    """The tensors of one operation, in a kernel whose programs own blocks of queries or of keys.

    ids: tensor name -> identifier. group_ids: group name -> the end of its identifiers. by_query, by_key: how a vector over queries, over
    keys, stands in a tile.
    """

    def __init__(self, attend: Attend, owner: Owner = "queries") -> None:
        self.attend, self.tensors, self.owner = attend, attend.tensors(), owner
        self.by_query, self.by_key = (OWNED, WALKED) if owner == "queries" else (WALKED, OWNED)
        self._before: Part = "rows" if owner == "queries" else "keys"
        self.ids = identifiers(self.tensors)
        self.group_ids = {} if attend.groups is None else identifiers(attend.groups.names)

    def _walked(self, name: str) -> bool:
        """Whether the tensor changes along the walk."""
        walked = J if self.owner == "queries" else I
        return any(walked in index.free_symbols for index in self.tensors[name])

    def arguments(self) -> list[str]:
        """Lines of the kernel's signature: strides, and the sizes that indices are clamped to."""
        lines = []
        for name, indices in self.tensors.items():
            found = [f"{self.ids[name]}_stride_{axis}" for axis in axis_names(indices)]
            if letters(indices) is None:
                found += [f"{self.ids[name]}_size_{axis}" for axis in axis_names(indices)]
            lines += [f"    {', '.join(found)},"] if found else []
        return lines

    def given(self) -> list[str]:
        """The arguments of the launch that `arguments` names."""
        lines = []
        for name, indices in self.tensors.items():
            sizes = f", *{self.ids[name]}.shape" if letters(indices) is None else ""
            lines += [f"        *broadcast_strides({self.ids[name]}){sizes},"] if indices else []
        return lines

    def load(self, name: str, part: Part) -> str:
        """The text of a load: one line, or a line for each axis that has to be clamped."""
        operand, indices = self.ids[name], self.tensors[name]
        plain = letters(indices)
        if plain is None:
            terms_ = (self._term(operand, place, part) for place in enumerate(indices))
            return "\n".join(["tl.load(", f"    {operand}", *(f"    + {term}" for term in terms_), ")"])
        across, along = (self.by_query if part in ("tile", "rows") else ""), (self.by_key if part in ("tile", "keys") else "")
        terms = {
            "b": f"b * {operand}_stride_b",
            "h": f"h * {operand}_stride_h",
            "i": f"first * {operand}_stride_i + rows{across} * {operand}_stride_i",
            "j": f"start * {operand}_stride_j + columns{along} * {operand}_stride_j",
        }
        address = " + ".join([operand, *(terms[axis] for axis in plain)])
        inside = [f"in_rows{across}"] if "i" in plain else []
        inside += [f"in_keys{along}"] if "j" in plain else []
        return f"tl.load({address}, mask={' & '.join(inside)}, other=0)" if inside else f"tl.load({address})"

    def _term(self, operand: str, place: tuple[int, sympy.Expr], part: Part) -> str:
        axis, index = place
        text = triton_text(index, self._positions(part))
        return f"tl.minimum(tl.maximum({text}, 0), {operand}_size_{axis} - 1).to(tl.int64) * {operand}_stride_{axis}"

    def _positions(self, part: Part) -> dict[str, str]:
        found = {"b": "b", "h": "h", "Nq": "Nq", "Nk": "Nk"}
        if part != "keys":
            found["i"] = f"i{self.by_query}" if part in ("tile", "rows") else "i"
        if part in ("tile", "keys"):
            found["j"] = f"j{self.by_key}"
        return found

    def cast(self, name: str) -> str:
        """Arithmetic is in float32; what only a predicate reads stays as it is."""
        return ".to(tl.float32)" if name in tensors_in(*self.attend.expressions()) else ""

    def outside_loop(self, part: Part, *expressions: sympy.Basic) -> list[str]:
        """Loads of what does not change along the walk, for the expressions that read it."""
        names = [name for name in tensors_in(*expressions) if not self._walked(name)]
        return [f"    {line}" for name in names for line in self._assigned(name, part)]

    def inside_loop(self, *expressions: sympy.Basic, beside: Sequence[sympy.Basic] = ()) -> list[str]:
        """Loads of what changes along the walk; beside: expressions whose tensors have been loaded."""
        loaded = tensors_in(*beside)
        names = [name for name in tensors_in(*expressions) if self._walked(name) and name not in loaded]
        return [line for name in names for line in self._assigned(name, "tile")]

    def _assigned(self, name: str, part: Part) -> list[str]:
        return f"{self.ids[name]}_{part} = {self.load(name, part)}{self.cast(name)}".splitlines()

    @cached_property
    def inside_names(self) -> dict[str, str]:
        """What the score, the mask and the weight print their symbols as, inside the loop."""
        tensors = {name: f"{self.ids[name]}_{'tile' if self._walked(name) else self._before}" for name in self.tensors}
        return {"qk": "qk", "w": "weight", **self._positions("tile"), **tensors}

    @cached_property
    def end_names(self) -> dict[str, str]:
        """What the group weights and the sink print theirs as, after the loop."""
        tensors = {name: f"{self.ids[name]}_end" for name in self.tensors if not self._walked(name)}
        masses = {f"mass_{name}": f"mass_{identifier}" for name, identifier in self.group_ids.items()}
        return {**self._positions("end"), **tensors, **masses}
