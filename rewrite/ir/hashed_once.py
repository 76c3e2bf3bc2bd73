"""Operations that are keys of caches at every call: hashing their expressions anew takes longer than a product of a few rows."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


class HashedOnce:
    """For a frozen dataclass: its hash, worked out once in each process."""

    def __hash__(self) -> int:
        if "_hash" not in self.__dict__:
            self.__dict__["_hash"] = hash(tuple(getattr(self, field.name) for field in fields(self)))  # type: ignore[arg-type]
        found: int = self.__dict__["_hash"]
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Without the hash, which another process computes differently."""
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}
