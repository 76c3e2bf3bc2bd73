"""The errors users see. Each message names the place, the reason and what to do."""

from __future__ import annotations


class RewriteError(Exception):
    """Base of every error this project raises on purpose."""


class FittingError(RewriteError):
    """Fitting cannot go on: nothing to train, models that do not belong together, a loss that is not finite."""


class PassError(RewriteError, ValueError):
    """A pass list that cannot be taken as written: unknown name, bad parameter, passes that exclude each other."""


class NoAttentionError(RewriteError):
    """The model has no attention that was recognised."""


class NotApplicableError(RewriteError):
    """A pass fits no site of the model, or cannot be carried through it."""


class ModelCallError(RewriteError):
    """A call that the rewritten model cannot serve without being wrong."""
