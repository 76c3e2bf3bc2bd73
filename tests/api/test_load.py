"""`save` and `load`: what passes added, kept beside the pass list, on a fresh original."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rewrite import FittingError, load, parse_pass, rewrite, save
from tests.api.small import images, run, vit

PASSES = ["temperature(value=1.5)", "agent(tokens=9, learnable=True, layers=[1])"]


@functools.cache
def trained() -> nn.Module:
    """Rewritten, with parameters that are not what they start from."""
    torch.manual_seed(3)
    model = rewrite(vit(), PASSES, example_inputs=(images(),))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("rewrite_added."):
                parameter.normal_(std=0.3)
    return model


def test_loaded_onto_a_fresh_original(tmp_path: Path) -> None:
    save(trained(), tmp_path)
    original = vit()
    loaded = load(original, tmp_path, {"pixel_values": images()})
    assert torch.equal(run(loaded, images(seed=5)), run(trained(), images(seed=5)))
    assert not torch.equal(run(loaded, images()), run(rewrite(vit(), PASSES, example_inputs=(images(),)), images()))
    assert torch.equal(run(original, images()), run(vit(), images()))
    # The folder is what it says: passes with every parameter written out, and the added tensors alone.
    facts = json.loads((tmp_path / "passes.json").read_text())
    for text, written in zip(PASSES, facts["passes"], strict=True):
        assert parse_pass(written) == parse_pass(text)
        assert all(f"{each.name}=" in written for each in parse_pass(text).parameters())
    [(site, shapes)] = facts["sites"].items()
    assert set(load_file(tmp_path / "added.safetensors")) == {f"{site}.{name}" for name in shapes}


def test_the_model_saves_itself_as_before(tmp_path: Path) -> None:
    """`save_pretrained` writes the original's weights for the original's class, and what was added is kept beside them."""
    trained().save_pretrained(tmp_path)
    save(trained(), tmp_path)
    original = type(trained()).from_pretrained(tmp_path).eval()
    assert original.state_dict().keys() == vit().state_dict().keys()
    assert torch.equal(run(load(original, tmp_path, (images(),)), images()), run(trained(), images()))


def test_a_folder_that_is_of_another_model_names_the_site(tmp_path: Path) -> None:
    save(trained(), tmp_path)
    told = r"layers\.1\.attention: .*agent_ah_bias \[1, 3, 9, 7, 1\].*this model .*agent_ah_bias \[1, 3, 9, 8, 1\]"
    with pytest.raises(FittingError, match=told):
        load(vit(image_size=128), tmp_path, (images(height=128, width=128),))


def test_what_cannot_be_saved_or_loaded(tmp_path: Path) -> None:
    with pytest.raises(FittingError, match="was not rewritten"):
        save(vit(), tmp_path)
    with pytest.raises(FittingError, match="was not called yet"):
        save(rewrite(vit(), ["window(window=8)"]), tmp_path)
    with pytest.raises(FittingError, match="holds no saved passes"):
        load(vit(), tmp_path, (images(),))
    save(trained(), tmp_path)
    path = tmp_path / "passes.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "format": 99}))
    with pytest.raises(FittingError, match="in format 99"):
        load(vit(), tmp_path, (images(),))
    [site] = facts["sites"]
    path.write_text(json.dumps({**facts, "sites": {site: {**facts["sites"][site], "agent_more": [3]}}}))
    with pytest.raises(FittingError, match=rf"{site}: .*agent_more \[3\]"):
        load(vit(), tmp_path, (images(),))
