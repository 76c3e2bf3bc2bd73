"""Which tokens a rewritten model went on with: read off its calls, for pictures, counts and checks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from rewrite.compiled import KeptTokens
from rewrite.entry import session_of
from rewrite.ir.errors import RewriteError


@contextlib.contextmanager
def kept_tokens(model: nn.Module) -> Iterator[dict[str, KeptTokens]]:
    """Which tokens each attention site sees, by name of the site, of the last call inside the block in which tokens left.

    ``with kept_tokens(model) as kept: model(**inputs)``, or `generate()`: steps of decoding choose nothing, so what the prompt was cut to
    stays. Sites that see every token are not in it. The tensors are those that the model itself used; nothing is computed for it.

    Raises `RewriteError` for a model that was not rewritten.
    """
    session = session_of(model)
    if session is None:
        raise RewriteError("this model was not rewritten; kept_tokens() takes what rewrite() returned")
    kept: dict[str, KeptTokens] = {}
    session.kept.append(kept)
    try:
        yield kept
    finally:
        # By identity: two blocks may hold equal dictionaries.
        session.kept = [other for other in session.kept if other is not kept]
