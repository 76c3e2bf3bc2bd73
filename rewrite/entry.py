"""The ways into a rewritten model: what `module(...)` calls for every module that holds attention sites, and methods beside it."""

from __future__ import annotations

import threading
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from rewrite.dry_run import call_original
from rewrite.ir.errors import ModelCallError, NoAttentionError, NotApplicableError, RewriteError
from rewrite.methods import ways_in
from rewrite.runner import CAPTURE_ERRORS, Runner, is_running
from rewrite.session import Session
from rewrite.watch import unwatched, watched

# One thread at a time sets up: analyses, or runs a module as it is before its first capture.
_SETTING_UP = threading.RLock()


def install(session: Session) -> None:
    """Make every way into the model that reaches a site go through the compiler, or refuse."""
    modules = dict(session.root.named_modules())
    if not session.prepared:
        for path, module in modules.items():
            if path and any(True for _ in module.children()) and not isinstance(module, nn.ModuleList):
                Early(session, module, path).install()
    sites = [site.qualified_name for site in session.report.sites]
    changed = [site.qualified_name for site in session.report.sites if site.passes]
    crosses = any(site.kind.startswith("cross") for site in session.report.sites)
    entries = entry_modules(sites, session.embeddings, session.root)
    for path in entries:
        module = modules[path]
        Entry(session, module, path).install()
        Method(session, module, path, "forward").install()
        gridded = [name for name in changed if name in session.gridded]
        below = [_below(names, path) for names in (changed, gridded, session.embeddings, sorted(session.scoring))]
        for name, whole in ways_in(module, *below, crosses=crosses).items():
            (Method if whole else Driver)(session, module, path, name).install()
    for path in _holders(changed) - set(entries):
        if path in modules and not isinstance(modules[path], nn.ModuleList):
            Layer(session, modules[path], path).install()
    session.root.__dict__["rewrite_report"] = session.report


class Way(ABC):
    """Something that a module is called by. Copies and pickles of the module keep it."""

    def __init__(self, session: Session, module: nn.Module, prefix: str, method: str | None = None) -> None:
        self.session, self.module, self.prefix, self.method = session, module, prefix, method
        self.runner: Runner | None = None

    @abstractmethod
    def install(self) -> None:
        """Put it where the module looks it up."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if is_running():
            return call_original(self.module, arguments, keywords, self.method)
        return self.enter(*arguments, **keywords)

    @torch._dynamo.disable(reason="a rewritten model compiles itself; give rewrite() the backend instead")  # type: ignore[untyped-decorator, no-untyped-call]
    def enter(self, *arguments: Any, **keywords: Any) -> Any:
        try:
            with unwatched() as watch:
                return self._ready(arguments, keywords).run(arguments, keywords, watch)
        except Exception as error:
            # Dynamo leaves code alone for good that it once failed to trace; the next call is traced anew.
            self.runner = None
            own = self._own_error(arguments, keywords) if isinstance(error, CAPTURE_ERRORS) else None
            if own is None:
                raise
            raise own from None

    def _ready(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Runner:
        session = self.session
        with _SETTING_UP:
            if not session.prepared:
                remove_early(session.root)
                try:
                    session.prepare(arguments, keywords)
                    session.register_parameters()
                    session.warn_slower()
                finally:
                    install(session)
            session.warm_up(self.module, self.prefix, arguments, keywords, self.method)
            if self.runner is None:
                self.runner = Runner(session, self.module, self.prefix, session.backend, self.method)
            return self.runner

    def _own_error(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Exception | None:
        """What the model as it is raises for inputs that Dynamo failed on, or None."""
        try:
            with _SETTING_UP:
                self.session.seen.clear()
                self.session.warm_up(self.module, self.prefix, arguments, keywords, self.method)
        except Exception as error:
            return error
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "runner": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.install()


class Entry(Way):
    """`module(...)`."""

    def install(self) -> None:
        # nn.Module leaves `_compiled_call_impl` behind when it is copied; `_rewrite_entry` travels and puts it back.
        self.module.__dict__["_rewrite_entry"] = self
        self.module.__dict__["_compiled_call_impl"] = self
        # Dynamo, which inlines `forward` when somebody else compiles a caller of the module, takes `module(...)` for what it is by this.
        self.module.__dict__["__call__"] = self.__call__
        self.module.__dict__["compile"] = self.refuse

    def refuse(self, *arguments: Any, **keywords: Any) -> None:
        """Stands in for `nn.Module.compile`, which would put the original in the place of the rewritten model."""
        raise RewriteError("a rewritten model compiles itself: give rewrite() the backend, rewrite(model, passes, backend='inductor')")


class Layer(Entry):
    """`module(...)` of a part of a model that cannot be rewritten by itself: one layer, one attention."""

    def install(self) -> None:
        self.module.__dict__["_rewrite_layer"] = self
        self.module.__dict__["_compiled_call_impl"] = self
        self.module.__dict__["__call__"] = self.__call__

    @torch._dynamo.disable(reason="a layer of a rewritten model")  # type: ignore[untyped-decorator, no-untyped-call]
    def enter(self, *arguments: Any, **keywords: Any) -> Any:
        raise ModelCallError(
            f"{self.prefix} is one layer of a rewritten model and was called by itself, where neither its place in the model nor how its "
            "tokens lie is known; call the model, or the encoder that holds the layer, or the original"
        )


class Early(Layer):
    """`module(...)` of a part of a model that nothing is known of yet: `rewrite()` had no example_inputs, and the model was not called."""

    @torch._dynamo.disable(reason="a part of a model that waits for its first call")  # type: ignore[untyped-decorator, no-untyped-call]
    def enter(self, *arguments: Any, **keywords: Any) -> Any:
        with _SETTING_UP:
            remove_early(self.session.root)
            alone = Session(self.module, self.session.passes, "eager", may_add_parameters=True)
            try:
                alone.prepare(arguments, keywords)
            except (NoAttentionError, NotApplicableError):
                return call_original(self.module, arguments, keywords, self.method)
            finally:
                install(self.session)
        count = alone.report.counts()["rewritten"]
        raise ModelCallError(
            f"{self.prefix} was called before the model was, and the passes rewrite {count} attention sites in it; rewrite() had no "
            "example_inputs and does not know the model yet. Give it example_inputs, or call the model once before"
        )


def remove_early(root: nn.Module) -> None:
    """Leave a model that waits for its first call as it was."""
    for module in root.modules():
        if isinstance(module.__dict__.get("_rewrite_layer"), Early):
            for name in ("_rewrite_layer", "_compiled_call_impl", "__call__"):
                del module.__dict__[name]


class Method(Way):
    """`module.name(...)`, captured as a whole. Looks like the bound method that it stands for."""

    method: str

    def install(self) -> None:
        self.module.__dict__[self.method] = self

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return types.MethodType(self.__func__, self.module)

    @property
    def __func__(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(type(self.module), self.method)
        return function

    @property
    def __self__(self) -> nn.Module:
        return self.module

    @property
    def __name__(self) -> str:
        return self.method


class Driver(Method):
    """`module.name(...)`, which runs as it is and calls ways in; where visual tokens join a text in it is noted for them."""

    @torch._dynamo.disable(reason="a rewritten model compiles itself")  # type: ignore[untyped-decorator, no-untyped-call]
    def enter(self, *arguments: Any, **keywords: Any) -> Any:
        with watched():
            return call_original(self.module, arguments, keywords, self.method)


def session_of(model: nn.Module) -> Session | None:
    """The session of a rewritten model, or None."""
    entry = model.__dict__.get("_rewrite_entry")
    return entry.session if isinstance(entry, Entry) else None


def entry_modules(sites: Sequence[str], embeddings: Sequence[str], root: nn.Module) -> list[str]:
    """The modules that are models: that hold two sites or more, or one and what lays out its tokens. One site alone is a layer."""
    modules = dict(root.named_modules())
    counts = {"": len(sites)}
    for site in sites:
        for path in _above(site):
            counts[path] = counts.get(path, 0) + 1
    laying = _holders(embeddings)
    return [
        path
        for path, count in counts.items()
        if path == "" or ((count > 1 or path in laying) and path in modules and not isinstance(modules[path], nn.ModuleList))
    ]


def _above(name: str) -> list[str]:
    """The modules around a site or module, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _holders(names: Iterable[str]) -> set[str]:
    """All modules around the given ones, and they themselves; a second site of a module is called "name:2"."""
    return {path for name in names for path in (*_above(name), name.split(":")[0])}


def _below(names: Sequence[str], path: str) -> list[str]:
    """The names inside a module, as they are called there."""
    prefix = f"{path}." if path else ""
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
