"""Training what passes added to a model, and keeping it: `fit`, `fit_exit`, `save` and `load`."""

from rewrite.fitting.router import fit_exit
from rewrite.fitting.run import fit
from rewrite.fitting.saved import load, save

__all__ = ["fit", "fit_exit", "load", "save"]
