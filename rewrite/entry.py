"""The ways into a rewritten model: what `module(...)` calls for every module that holds attention sites."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rewrite.dry_run import call_original
from rewrite.ir.errors import RewriteError
from rewrite.runner import CAPTURE_ERRORS, Runner, is_running
from rewrite.session import Session

# One thread at a time sets up: analyses, or runs a module as it is before its first capture.
_SETTING_UP = threading.RLock()


def install(session: Session) -> None:
    """Make every way into the model that reaches a site go through the compiler."""
    modules = dict(session.root.named_modules())
    for path in entry_modules([site.qualified_name for site in session.report.sites], session.root):
        Entry(session, modules[path], path).install()
    session.root.__dict__["rewrite_report"] = session.report


class Entry:
    """A way into a rewritten model: what `module(...)` calls. Copies and pickles of the module keep it."""

    def __init__(self, session: Session, module: nn.Module, prefix: str) -> None:
        self.session, self.module, self.prefix = session, module, prefix
        self.runner: Runner | None = None

    def install(self) -> None:
        # nn.Module leaves `_compiled_call_impl` behind when it is copied; `_rewrite_entry` travels and puts it back.
        self.module.__dict__["_rewrite_entry"] = self
        self.module.__dict__["_compiled_call_impl"] = self
        # Dynamo, which inlines `forward` when somebody else compiles a caller of the module, takes `module(...)` for what it is by this.
        self.module.__dict__["__call__"] = self.__call__
        self.module.__dict__["compile"] = self.refuse

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if is_running():
            return call_original(self.module, arguments, keywords)
        return self.enter(*arguments, **keywords)

    @torch._dynamo.disable(reason="a rewritten model compiles itself; give rewrite() the backend instead")  # type: ignore[untyped-decorator, no-untyped-call]
    def enter(self, *arguments: Any, **keywords: Any) -> Any:
        try:
            return self._ready(arguments, keywords).run(arguments, keywords)
        except Exception as error:
            # Dynamo leaves code alone for good that it once failed to trace; the next call is traced anew.
            self.runner = self.session.runner = None
            own = self._own_error(arguments, keywords) if isinstance(error, CAPTURE_ERRORS) else None
            if own is None:
                raise
            raise own from None

    def _ready(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Runner:
        session = self.session
        with _SETTING_UP:
            if not session.prepared:
                session.prepare(arguments, keywords)
                session.register_parameters()
                install(session)
            session.warm_up(self.module, self.prefix, arguments, keywords)
            if self.runner is None:
                # What the analysis compiled is what runs.
                captured = session.runner if self.prefix == "" else None
                self.runner = captured or Runner(session, self.module, self.prefix)
            return self.runner

    def _own_error(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Exception | None:
        """What the model as it is raises for inputs that Dynamo failed on, or None."""
        try:
            with _SETTING_UP:
                self.session.seen.clear()
                self.session.warm_up(self.module, self.prefix, arguments, keywords)
        except Exception as error:
            return error
        return None

    def refuse(self, *arguments: Any, **keywords: Any) -> None:
        """Stands in for `nn.Module.compile`, which would put the original in the place of the rewritten model."""
        raise RewriteError("a rewritten model compiles itself: give rewrite() the backend, rewrite(model, passes, backend='inductor')")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "runner": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.install()


def session_of(model: nn.Module) -> Session | None:
    """The session of a rewritten model, or None."""
    entry = model.__dict__.get("_rewrite_entry")
    return entry.session if isinstance(entry, Entry) else None


def entry_modules(sites: Sequence[str], root: nn.Module) -> list[str]:
    """The modules that hold two sites or more: whoever is entered alone with one site only is a layer, not a model."""
    modules = dict(root.named_modules())
    holders: dict[str, int] = {"": len(sites)}
    for site in sites:
        parts = site.split(".")
        for count in range(1, len(parts)):
            path = ".".join(parts[:count])
            holders[path] = holders.get(path, 0) + 1
    return [
        path
        for path, count in holders.items()
        if path == "" or (count > 1 and path in modules and not isinstance(modules[path], nn.ModuleList))
    ]
