"""What every emitted file of kernels is known by, whatever its kernels compute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from codegen.cache import load
from rewrite.ir.operations import Attend


@dataclass(frozen=True)
class EmittedKernel:
    """An emitted file. Its subclasses say which functions are in it, and compile them.

    name: what the names of its functions begin with. site: the sites it was made for, joined by ", ". passes: what shaped it. path: the
    file, source: its text. attend_json: the operation, what `rewrite::attend` is called with.
    """

    name: str
    site: str
    passes: tuple[str, ...]
    path: Path
    source: str
    attend_json: str

    @property
    def attend(self) -> Attend:
        """The operation, its operands named query, key, value and result."""
        return Attend.from_json(self.attend_json)

    def load(self) -> ModuleType:
        """The module in `path`: its kernels and ``launch``. Raises `RewriteError` where the file is not what was emitted."""
        return load(self.path)
