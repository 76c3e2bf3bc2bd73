"""DyVTE's routers: what they are asked, that the tokens leave where they say, and what they learn, on a LLaVA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from rewrite import FittingError, fit, fit_exit, kept_tokens
from tests.models.architectures import llava, llava_inputs, rewritten
from tests.models.oracles import visual_masked_from
from tests.models.test_llava import GREEDY, visual_of

LAYERS = (1, 2, 3)


def features(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What the router in front of each layer is given, row by row."""
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    behind = [int(row.nonzero()[-1]) + 1 for row in visual_of(inputs)]
    return [torch.stack([torch.cat([h[row, first:-1].mean(0), h[row, -1]]) for row, first in enumerate(behind)]) for h in hidden]


def told(changed: Any, given: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    """By layer, how much more each row's router is for leaving."""
    held = {name.split(".layers.")[1]: tensor for name, tensor in changed.named_parameters() if "router" in name}
    by = {layer: [held[f"{layer}.self_attn.router_{part}"] for part in ("up", "down")] for layer in LAYERS}
    return {layer: functional.gelu(given[layer] @ up.T) @ down.T @ torch.tensor([-1.0, 1.0]) for layer, (up, down) in by.items()}


def test_routers_let_the_image_go_and_learn_when() -> None:
    model, inputs = llava("sdpa"), llava_inputs()
    visual, given = visual_of(inputs), features(model, inputs)
    changed = rewritten(model, ["token_exit(router=8)"], inputs)
    parameters = {name: tensor for name, tensor in changed.named_parameters() if "router" in name}
    assert len(parameters) == 9
    with torch.no_grad():
        # Untrained they never say so.
        assert torch.equal(changed(**inputs).logits, model(**inputs).logits)
        for tensor in parameters.values():
            if tensor.ndim == 2:
                tensor.normal_()
        # In front of layer 1 one row's image leaves, and the other's in front of layer 2.
        early = told(changed, given)[1] > told(changed, given)[1].mean()
        for layer, margin in ((1, -told(changed, given)[1].mean()), (2, 1 - told(changed, given)[2].min())):
            changed.get_parameter(f"rewrite_added.model.language_model.layers.{layer}.self_attn.router_margin").fill_(margin)
    with kept_tokens(changed) as kept:
        actual = changed.generate(**inputs, **GREEDY)
    assert sorted(early.tolist()) == [False, True]
    # What pads a prompt leaves with its image.
    text = 14 - (inputs["attention_mask"] == 0).sum(1)
    assert [one.mask.sum(1).tolist() for one in kept.values()] == [torch.where(early, text, 30).tolist(), text.tolist(), text.tolist()]
    with visual_masked_from(model, 1, visual & early[:, None]), visual_masked_from(model, 2, visual):
        assert torch.equal(actual, model.generate(**inputs, **GREEDY))

    # Labels by the original with the visual tokens masked, at thresholds that some rows and layers meet.
    labels = inputs["input_ids"].masked_fill(visual | (inputs["attention_mask"] == 0), -100)
    labels[:, : int(visual.nonzero()[:, 1].max()) + 1] = -100
    wanted, losses, same = labels[:, 1:], {}, {}
    with torch.no_grad():
        whole = model(**inputs).logits[:, :-1]
        for layer in (0, *LAYERS):
            with visual_masked_from(model, layer or 4, visual):
                logits = model(**inputs).logits[:, :-1]
            each = functional.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=-100, reduction="none")
            losses[layer] = each.sum(1) / (wanted != -100).sum(1)
            same[layer] = ((logits.argmax(-1) == whole.argmax(-1)) & (wanted != -100)).sum(1) / (wanted != -100).sum(1)
    excess = float(torch.cat([losses[layer] / losses[0] for layer in LAYERS]).median()) + 1e-3
    agreement = float(torch.cat([same[layer] for layer in LAYERS]).min()) - 1e-3
    may = {layer: (losses[layer] < excess * losses[0]) & (same[layer] > agreement) for layer in LAYERS}
    assert 0 < int(torch.stack([*may.values()]).sum()) < 6
    before = {name: tensor.clone() for name, tensor in changed.named_parameters()}
    batches = [{**inputs, "labels": labels}]
    fit_exit(changed, batches, steps=90, learning_rate=0.05, agreement=agreement, excess=excess)
    for layer, more in told(changed, given).items():
        assert torch.equal(more > 0, may[layer])
    for name, tensor in changed.named_parameters():
        moved = name.endswith(("router_up", "router_down"))
        assert torch.equal(tensor, before[name]) != moved or name.endswith("router_margin"), name
        assert not name.endswith("router_margin") or not tensor.any()
    with pytest.raises(FittingError, match="no labels"):
        fit_exit(changed, [inputs])
    with pytest.raises(FittingError, match="empty"):
        fit_exit(changed, [])
    with pytest.raises(FittingError, match="which fit_exit trains"):
        fit(model, changed, batches)
    with pytest.raises(FittingError, match="router=2048"):
        fit_exit(model, batches)
