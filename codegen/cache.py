"""Emitted kernels on disk: one readable file per content, in a folder that nobody else can write to.

Files are named ``<kernel name>_<hash of the content>.py``, written atomically, and checked against their name before they are run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
import sys
import tempfile
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from rewrite.ir.errors import RewriteError

# 16 hex digits, 64 bits: names stay readable, and two kernels of one cache do not meet by chance.
HASH_DIGITS = 16


def cache_directory() -> Path:
    """``REWRITE_CACHE_DIR``, or ``attention-rewrite`` in the user's cache (``XDG_CACHE_HOME``, ``~/.cache``); created with mode 0700.

    Raises `RewriteError` where somebody else owns the folder or may write to it: what lies in it is run.
    """
    chosen = os.environ.get("REWRITE_CACHE_DIR")
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(chosen).expanduser() if chosen else Path(user_cache).expanduser() / "attention-rewrite"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.stat()
    if facts.st_uid != os.getuid():
        raise RewriteError(
            f"the kernel cache {folder} belongs to user {facts.st_uid}, and its files are run: "
            f"set REWRITE_CACHE_DIR to a folder of your own"
        )
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RewriteError(
            f"others may write to the kernel cache {folder} (mode {stat.S_IMODE(facts.st_mode):04o}), and its files are run: "
            f"chmod 700 it, or set REWRITE_CACHE_DIR to a folder of your own"
        )
    return folder


def content_hash(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:HASH_DIGITS]


def store(name: str, source: str) -> Path:
    """The path of the file with this kernel's source, written if it is not there."""
    path = cache_directory() / f"{name}_{content_hash(source)}.py"
    if not path.exists():
        write_whole(path, source)
    return path


def write_whole(path: Path, text: str, over: bool = True) -> None:
    """Write a file so that nobody sees half of it. over: replace one that is there, else the first writer's stays."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        if over or not _linked(temporary, path):
            os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _linked(temporary: str, path: Path) -> bool:
    """Give a file its name unless the name is taken; False where the file system has no links."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True


class _VerifiedLoader(SourceFileLoader):
    """Runs the text that was checked: neither a later version of the file nor compiled code from beside it."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        super().__init__(name, str(path))
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._source, self.path, "exec", dont_inherit=True)


def load(path: Path) -> ModuleType:
    """The module in a file of the cache, imported once per process.

    Raises `RewriteError` where the file is missing or its content is not what its name says.
    """
    cache_directory()
    name = f"attention_rewrite_kernels.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    try:
        source = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RewriteError(f"the emitted kernel {path} is gone; emit it again, or unset REWRITE_CACHE_DIR if the folder moved") from error
    if content_hash(source) != path.stem.rpartition("_")[2]:
        raise RewriteError(f"the emitted kernel {path} was changed after it was written; delete the file, and it is emitted afresh")
    spec = importlib.util.spec_from_file_location(name, path, loader=_VerifiedLoader(name, path, source))
    if spec is None or spec.loader is None:
        raise RewriteError(f"{path} cannot be imported as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
