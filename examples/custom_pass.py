"""A pass of your own: attention that prefers what is near. Run it with `python -m examples.custom_pass`."""

from dataclasses import dataclass, replace

import sympy
import torch

from rewrite import Pass, Site, kernels, parameter, register_pass, rewrite
from rewrite.ir import I, J

from .torchvision_or_not import let_transformers_import


@register_pass
@dataclass(frozen=True)
class Nearby(Pass):
    """Takes `slope` times the distance between query and key from every score; at 0, nothing changes."""

    name, family = "nearby", "redistribute"
    paper = "Press, Smith, Lewis: Train Short, Test Long (ALiBi), ICLR 2022 (arXiv 2108.12409)"
    formula = "out[i] = softmax_j(score[i,j] - slope |i - j|) v[j]"

    slope: float = parameter(0.05, "what a step in the sequence costs; 0 changes nothing")

    def check(self) -> None:
        self.require(self.slope >= 0.0, "slope", "at least 0")

    def transform(self, site: Site) -> Site:
        return site.with_operations(replace(site.attend, score=site.attend.score - self.slope * sympy.Abs(I - J)))


if __name__ == "__main__":
    let_transformers_import()
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768, initializer_range=0.2)
    model, inputs = ViTModel(config).eval(), {"pixel_values": torch.randn(1, 3, 224, 224)}
    rewritten = rewrite(model, passes=["nearby(slope=0.1)"], example_inputs=inputs)
    with torch.no_grad():
        change = (rewritten(**inputs).last_hidden_state - model(**inputs).last_hidden_state).abs().max()
    print(rewritten.rewrite_report, f"largest change of the output: {change:.3g}", sep="\n")
    print(*(f"kernel {kernel.name}: {kernel.path}" for kernel in kernels(rewritten)), sep="\n")
