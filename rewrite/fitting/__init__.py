"""Training what passes added to a model, and keeping it: `fit`, `save` and `load`."""

from rewrite.fitting.run import fit
from rewrite.fitting.saved import load, save

__all__ = ["fit", "load", "save"]
