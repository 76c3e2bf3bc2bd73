"""A compiler for attention: ``model = rewrite(model, passes=["agent", "token_exit"])``."""

from typing import Any

from rewrite.api import autotune, explain, kernels, rewrite
from rewrite.contrast import contrast
from rewrite.fitting import fit, fit_exit, load, save
from rewrite.ir import (
    AttentionInputs,
    Fits,
    Fitting,
    FittingError,
    ModelCallError,
    NoAttentionError,
    NotApplicableError,
    Pass,
    PassError,
    Program,
    RewriteError,
    Site,
    available_passes,
    parameter,
    parse_pass,
    register_pass,
)
from rewrite.kept import kept_tokens
from rewrite.prediction import SlowerWarning
from rewrite.report import Report
from rewrite.states import cached_tokens
from rewrite.sweep import HeadSweep, sweep_heads

__version__ = "0.1.0"

__all__ = [
    "AttentionInputs",
    "Fits",
    "Fitting",
    "FittingError",
    "HeadSweep",
    "ModelCallError",
    "NoAttentionError",
    "NotApplicableError",
    "Pass",
    "PassError",
    "Program",
    "Report",
    "RewriteError",
    "Site",
    "SlowerWarning",
    "autotune",
    "available_passes",
    "cached_tokens",
    "contrast",
    "explain",
    "fit",
    "fit_exit",
    "kernels",
    "kept_tokens",
    "load",
    "parameter",
    "parse_pass",
    "register_pass",
    "rewrite",
    "save",
    "sweep_heads",
]


def __getattr__(name: str) -> Any:
    """Every registered pass class is an attribute of the package: ``from rewrite import TokenExit``."""
    for cls in available_passes():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module 'rewrite' has no attribute {name!r}")
