"""Several sequences packed into one row of a language model: what its mask hides is left out, and each sequence gets what it gets alone."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from codegen import torch_streaming
from codegen.state_call import through_state
from codegen.state_form import StateForm, state_form
from rewrite import kernels, rewrite
from rewrite.ir import Attend

LENGTH, SHORT = 160, 37
CONFIG = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, use_cache=False
)


def test_packed_sequences_are_those_of_a_batch() -> None:
    torch.manual_seed(0)
    model = LlamaModel(CONFIG).eval()
    ids = torch.randint(0, 50, (2, LENGTH))
    row = {"input_ids": ids.view(1, -1), "position_ids": torch.arange(LENGTH).repeat(2)[None], "use_cache": False}
    found = rewrite(model, ["temperature(value=2.0)"], row)
    assert "tile_list" in kernels(found)[0].source
    with torch.no_grad():
        packed = found(**row).last_hidden_state.view(2, LENGTH, -1)
        alone = found(input_ids=ids, use_cache=False).last_hidden_state
        # Other lengths, in the same graph: up to where the second sequence begins now, all is as it was.
        positions = torch.cat([torch.arange(SHORT), torch.arange(2 * LENGTH - SHORT)])[None]
        uneven = found(**{**row, "position_ids": positions}).last_hidden_state[0]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    before, after = (packed.flatten(0, 1) - uneven).abs().split((SHORT, 2 * LENGTH - SHORT))
    assert before.max() < 1e-4
    assert after.amax(1).min() > 1e-3


def gradients(model: torch.nn.Module, output: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(output.square().mean(), list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        assert (gradient - right[name]).abs().max() <= 1e-4 * max(1e-3, float(right[name].abs().max())), name


def test_linear_attention_of_packed_sequences_has_a_state_of_each() -> None:
    """The model makes one mask of all pairs of positions that are data: it is read as segments and an order, of which kernels are made."""
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (2, 2 * LENGTH))
    row = {"input_ids": ids.view(1, -1), "position_ids": torch.arange(2 * LENGTH).repeat(2)[None], "use_cache": False}
    found = rewrite(LlamaModel(CONFIG).eval(), ["hedgehog(features=4)"], row)
    assert any("PAIRED_MASK" in kernel.source and "key_order" in kernel.source for kernel in kernels(found))
    read: list[Attend] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_streaming, "through_state", lambda *given: (read.append(given[0]), through_state(*given))[1])
        packed = found(**row).last_hidden_state
    assert all(isinstance(state_form(attend), StateForm) for attend in read)
    alone = found(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(packed.view_as(alone), alone, rtol=1e-4, atol=1e-5)
    same(gradients(found, packed), gradients(found, alone))


class PackedPictures(torch.nn.Module):
    """Attention of pictures of any sizes in one row of patches, as NaViT has it (Dehghani et al. 2023, section 2.1)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.projection = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

    def forward(self, patches: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(patches).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        same_picture = pictures[:, None, :, None] == pictures[:, None, None]
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=same_picture)
        return patches + self.projection(attended.transpose(1, 2).flatten(2))


class Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(PackedPictures() for _ in range(2))

    def forward(self, patches: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            patches = layer(patches, pictures)
        return patches


def test_packed_pictures_have_a_state_each() -> None:
    """A row of pictures of 300, 1, 40 and 200 patches, one of them in two parts, against each alone."""
    torch.manual_seed(0)
    numbers = torch.tensor([7] * 250 + [3] + [5] * 40 + [7] * 50 + [0] * 200)
    patches = torch.randn(1, len(numbers), 32)
    found = rewrite(Encoder(), ["hedgehog(features=4)"], {"patches": patches, "pictures": numbers[None]})
    assert found.rewrite_report.counts()["rewritten"] == 2
    assert any("PAIRED_MASK" in kernel.source for kernel in kernels(found))
    packed = found(patches, numbers[None])
    alone = torch.empty_like(packed)
    for number in numbers.unique():
        own = numbers == number
        alone = alone.index_copy(1, own.nonzero().flatten(), found(patches[:, own], numbers[None, own]))
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    same(gradients(found, packed), gradients(found, alone))
