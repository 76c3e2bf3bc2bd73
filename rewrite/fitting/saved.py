"""What passes added to a model, kept beside the pass list: `save` writes it, `load` puts it onto a fresh original.

A folder holds `passes.json` (the passes with every parameter written out, and which site has which tensors) and `added.safetensors`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rewrite.api import ExampleInputs, rewrite
from rewrite.compiled import InnerBackend
from rewrite.entry import session_of
from rewrite.fitting.checkpoint import replace_text
from rewrite.ir.errors import FittingError
from rewrite.ir.passes import Pass
from rewrite.session import ADDED, Session, state_name

ModuleType = TypeVar("ModuleType", bound=nn.Module)

FORMAT = 1
PASSES, TENSORS = "passes.json", "added.safetensors"


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a rewritten model's pass list and what its passes added to it, for `load`. The original's own weights are not written.

    Raises `FittingError` for a model that is not rewritten, or that waits for its first call.
    """
    session = session_of(model)
    if session is None or not session.prepared:
        told = "was not rewritten" if session is None else "was not called yet; give rewrite() example_inputs"
        raise FittingError(f"this model {told}; save() takes what rewrite() returned")
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    tensors = _added(session)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, place / TENSORS)
    facts = {
        "format": FORMAT,
        "rewrite": _version(),
        "passes": [_written_out(one) for one in session.passes],
        "sites": {site: {name: list(tensor.shape) for name, tensor in own.items()} for site, own in _by_site(tensors).items()},
    }
    replace_text(place / PASSES, json.dumps(facts, indent=1))


def load(
    original: ModuleType,
    folder: str | os.PathLike[str],
    example_inputs: ExampleInputs,
    backend: InnerBackend = "eager",
) -> ModuleType:
    """The original rewritten as `save` found it, with the parameters that were saved. Arguments as for `rewrite`.

    Raises `FittingError` for a folder that cannot be read, and where the sites that have parameters, or their names and shapes, are not
    those that were saved, naming the site; what `rewrite` raises for the passes.
    """
    place = Path(folder)
    try:
        facts = json.loads((place / PASSES).read_text())
        known, by, passes, sites = (facts[name] for name in ("format", "rewrite", "passes", "sites"))
        tensors = load_file(place / TENSORS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise FittingError(f"{place} holds no saved passes that can be read ({error!r}); save(model, folder) writes them") from error
    if known != FORMAT:
        raise FittingError(f"{place} was written by attention-rewrite {by} in format {known}; this is {_version()}, which reads {FORMAT}")
    said = f"{place}, which attention-rewrite {by} wrote (this is {_version()})"
    _compare(
        sites,
        {site: {name: list(tensor.shape) for name, tensor in own.items()} for site, own in _by_site(tensors).items()},
        said,
        "its tensors",
    )
    model = rewrite(original, passes, example_inputs, backend=backend)
    session = session_of(model)
    assert session is not None
    added = _added(session)
    there = {site: {name: list(tensor.shape) for name, tensor in own.items()} for site, own in _by_site(added).items()}
    _compare(sites, there, said, "this model")
    with torch.no_grad():
        for name, tensor in tensors.items():
            added[name].copy_(tensor)
    return model


def _added(session: Session) -> dict[str, torch.Tensor]:
    """What the passes added, by full name."""
    there = dict(session.root.named_parameters())
    places = {name: f"{ADDED}.{state_name(name)}" for name in session.added}
    return {name: there[place] for name, place in places.items() if place in there}


def _by_site(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        site, _, own = name.rpartition(".")
        found.setdefault(site, {})[own] = tensor
    return found


def _compare(saved: Mapping[str, Any], there: Mapping[str, Any], said: str, where: str) -> None:
    for site in sorted(saved.keys() | there.keys()):
        if saved.get(site) != there.get(site):
            raise FittingError(
                f"{site or 'the model'}: {said} has {_told(saved.get(site))} for it, {where} {_told(there.get(site))}; load onto the "
                "model, and with the input sizes, that were saved"
            )


def _told(shapes: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items()) if shapes else "no parameters"


def _written_out(one: Pass) -> str:
    """The pass as text with every parameter, so that a later version's defaults do not change it."""
    return f"{one.name}({', '.join(f'{each.name}={getattr(one, each.name)!r}' for each in dataclasses.fields(one))})"


def _version() -> str:
    from rewrite import __version__

    return __version__
