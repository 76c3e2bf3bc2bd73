"""A pass of your own: attention at another temperature. Run it with `python examples/custom_pass.py`."""

from dataclasses import dataclass, replace

import torch
from torchvision_or_not import let_transformers_import

from rewrite import Pass, Site, kernels, parameter, register_pass, rewrite


@register_pass
@dataclass(frozen=True)
class Temperature(Pass):
    """Divides every score by `value` before the softmax: above 1, attention is smoother; at 1, nothing changes."""

    name, family = "temperature", "redistribute"
    paper = "Gu, Tresp, Qin: Are Vision Transformers Robust to Patch Perturbations?, ECCV 2022 (arXiv 2111.10659)"
    formula = "out = softmax(score / value) v"

    value: float = parameter(1.5, "what the scores are divided by; 1 changes nothing")

    def check(self) -> None:
        self.require(self.value >= 1.0, "value", "at least 1")

    def transform(self, site: Site) -> Site:
        return site.with_operations(replace(site.attend, score=site.attend.score / self.value)) if self.value != 1 else site


if __name__ == "__main__":
    let_transformers_import()
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768, initializer_range=0.2)
    model, inputs = ViTModel(config).eval(), {"pixel_values": torch.randn(1, 3, 224, 224)}
    rewritten = rewrite(model, passes=["temperature(value=2)"], example_inputs=inputs)
    with torch.no_grad():
        change = (rewritten(**inputs).last_hidden_state - model(**inputs).last_hidden_state).abs().max()
    print(rewritten.rewrite_report, f"largest change of the output: {change:.3g}", sep="\n")
    print(*(f"kernel {kernel.name}: {kernel.path}" for kernel in kernels(rewritten)), sep="\n")
