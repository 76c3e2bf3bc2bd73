"""The report, the emitted kernels, and rewriting at the first call."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch

from rewrite import Fits, Pass, Report, Site, explain, kernels, rewrite
from tests.api.small import PASSES, deit, images, run
from tests.models.architectures import llava, llava_inputs


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    model, inputs = llava("sdpa", layers=2, vision_layers=2), llava_inputs()
    with torch.no_grad():
        return {"none": explain(model, inputs), "agent": explain(model, inputs, ["agent(tokens=4)"])}


def test_statuses(reports: dict[str, Report]) -> None:
    assert reports["none"].counts() == {"rewritten": 0, "kept": 4, "declined": 0}
    assert reports["agent"].counts() == {"rewritten": 2, "kept": 0, "declined": 2}
    assert reports["none"].passes == ()
    assert reports["agent"].passes == ("agent(tokens=4)",)


def test_sites(reports: dict[str, Report]) -> None:
    vision = [site for site in reports["agent"].sites if site.status == "rewritten"]
    text = [site for site in reports["agent"].sites if site.status == "declined"]
    assert [site.qualified_name for site in vision] == [f"model.vision_tower.encoder.layers.{layer}.self_attn" for layer in range(2)]
    assert [site.qualified_name for site in text] == [f"model.language_model.layers.{layer}.self_attn" for layer in range(2)]
    for site in vision:
        assert (site.kind, site.causal, site.heads, site.kv_heads, site.tokens, site.head_dim) == ("self", False, 4, 4, 17, 16)
        assert site.token_layout == "1 prefix + grid 4x4"
        assert site.passes == ("agent(tokens=4)",)
        assert site.cost_after.multiply_adds < site.cost_before.multiply_adds
    for site in text:
        assert (site.causal, site.heads, site.kv_heads, site.tokens) == (True, 4, 2, 30)
        assert site.passes == ()
        assert "it is causal" in site.reason
        assert site.cost_after == site.cost_before
    assert reports["agent"].total_after.multiply_adds < reports["agent"].total_before.multiply_adds
    assert reports["none"].total_after == reports["none"].total_before == reports["agent"].total_before


def test_plain_data(reports: dict[str, Report]) -> None:
    for report in reports.values():
        plain = report.to_dict()
        assert json.loads(json.dumps(plain)) == plain | {"tokens": json.loads(json.dumps(plain["tokens"]))}
        assert [site["status"] for site in plain["sites"]] == [site.status for site in report.sites]
        assert plain["sites"][0]["cost_before"]["multiply_adds"] == report.sites[0].cost_before.multiply_adds


def test_text(reports: dict[str, Report]) -> None:
    text = str(reports["agent"])
    assert "Attention sites (agent(tokens=4))" in text
    assert "tokens: grid 4x4, 1 prefix tokens" in text
    assert "2 rewritten, 2 declined" in text
    assert max(map(len, text.splitlines())) <= 160
    assert "Attention sites (no passes)" in str(reports["none"])


def test_explain_changes_nothing() -> None:
    model, inputs = deit(), images()
    attributes, before = set(vars(model)), run(model, inputs)
    explain(model, (inputs,), PASSES)
    assert set(vars(model)) == attributes
    assert torch.equal(run(model, inputs), before)


def test_lazily() -> None:
    inputs = images()
    changed = rewrite(deit(), PASSES)
    assert changed.rewrite_report.passes == ("agent(tokens=9)",)
    assert changed.rewrite_report.sites == []
    assert "rewriting happens at the first call" in str(changed.rewrite_report)
    assert kernels(changed) == ()
    now = rewrite(deit(), PASSES, example_inputs=(inputs,))
    assert torch.equal(run(changed, inputs), run(now, inputs))
    assert changed.rewrite_report.to_dict() == now.rewrite_report.to_dict()
    assert [kernel.path for kernel in kernels(changed)] == [kernel.path for kernel in kernels(now)]


def test_later_calls_leave_the_report_as_it_is() -> None:
    changed = rewrite(deit(), PASSES, example_inputs=(images(),))
    before = changed.rewrite_report.to_dict()
    for batch in (1, 3, 5):
        run(changed, images(batch))
    assert changed.rewrite_report.to_dict() == before


def test_kernels() -> None:
    (kernel,) = kernels(rewrite(deit(), PASSES, example_inputs=(images(),)))
    assert kernel.name.isidentifier()
    assert kernel.site == "blocks.0.attn, blocks.1.attn"
    assert kernel.passes == ("agent(tokens=9)",)
    assert kernel.path.read_text() == kernel.source
    header = kernel.source.split('"""')[1]
    for words in ("out[b,h,i,:] = sum_j", "0.25*qk", kernel.site, "agent(tokens=9)"):
        assert words in header
    assert f"def {kernel.name}(" in kernel.source
    compiled = kernel.compile("sm_90", torch.bfloat16, head_dim=16)
    assert ".target sm_90" in compiled.ptx
    assert compiled.spills == 0


@dataclass(frozen=True)
class Doubled(Pass):
    """Doubles every score, of whatever attention."""

    name, family, paper, formula = "doubled", "redistribute", "none; a test", "softmax(2 score) v"
    fits = Fits(unusual=True, kinds=frozenset({"self", "cross"}))

    def transform(self, site: Site) -> Site:
        return site.with_operations(replace(site.attend, score=2 * site.attend.score))


def test_what_has_no_kernel_is_said() -> None:
    """CaiT mixes its heads, which no kernel of one head can do; its class attention does not."""
    import timm

    small = {"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": 1, "depth_token_only": 1}
    model = timm.create_model("cait_xxs24_224", **small).eval()
    with torch.no_grad():
        report = explain(model, (images(1, 64, 64),), [Doubled()])
    assert report.counts()["rewritten"] == 2
    (note,) = [note for note in report.notes if "without a kernel" in note]
    assert note.startswith("blocks.0.attn run in torch operators")
    assert "mixes heads" in note
    assert note in " ".join(str(report).split())
