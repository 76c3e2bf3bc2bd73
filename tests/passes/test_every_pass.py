"""What holds for every registered pass. Generated from the registry: a new pass is tested here without a line of its own."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from synthetic_sites import SITES, Example, example, random_parameters

from rewrite.ir import Attend, Pass, Program, available_passes, parse_pass

# Settings worth testing besides the default one and the identity.
SETTINGS: dict[str, tuple[str, ...]] = {
    "agent": (
        "agent(tokens=4)",
        "agent(tokens=4, learnable=True)",
        "agent(tokens=9, layers=(3,))",
        "agent(tokens=5)",
        "agent(layers=(0,))",
        "agent(tokens=(9, 4), drop_bias=True)",
        "agent(tokens=4, learnable=True, drop_bias=True, stacks=(0, 2))",
        "agent(tokens=4, stacks=(1,))",
    ),
    "agent_sd": (
        "agent_sd(ratio=0.4, stride=4, agent_ratio=0.95, seed=None)",
        "agent_sd(ratio=0.7, stride=(2, 3), agent_ratio=0.9, power=0.5, shortcut=0.5, seed=3)",
        "agent_sd(ratio=0.5, agent_ratio=0.5)",
        "agent_sd(ratio=0.99, layers=(3,))",
        "agent_sd(stride=(9, 1))",
    ),
    "neighborhood": (
        "neighborhood(window=3)",
        "neighborhood(window=4, dilation=2)",
        "neighborhood(window=(3, 5), dilation=(2, 1))",
        "neighborhood(window=(8, 3))",
        "neighborhood(window=(2, 3, 4))",
        "neighborhood(window=5, layers=(1, 2))",
        "neighborhood(window=4, dilation=2, stride=3)",
        "neighborhood(window=(3, 4), stride=(2, 4), causal=(True, False))",
        "neighborhood(window=5, stride=2, causal=True)",
    ),
    "lightning": ("lightning(scale='site')", "lightning(layers=(3,))"),
    "hedgehog": ("hedgehog(features=3)", "hedgehog(features=2, window=5)", "hedgehog(features=4, window=1, affine=True, layers=(3,))"),
    "inline_attention": (
        "inline_attention(local=True)",
        "inline_attention(kernel='relu', drop_bias=True)",
        "inline_attention(kernel='leaky_relu', stacks=(0,), layers=(3,))",
        "inline_attention(kernel='exp', local=True)",
        "inline_attention(stacks=(1,))",
    ),
    "rala": ("rala(learnable=True)", "rala(layers=(2,))"),
    "enhanced_linear": ("enhanced_linear(smallest=0.5)", "enhanced_linear(layers=(0,))"),
    "token_exit": (
        "token_exit(layer=0)",
        "token_exit(layer=4)",
        "token_exit(layer=6)",
        "token_exit(relevance=0.5)",
        "token_exit(router=8)",
    ),
    "evit": ("evit(keep=0.5, layers=(3,))", "evit(layers=(3,), fuse=False)", "evit(keep=0.99, layers=(2, 3))"),
    "fastv": ("fastv(layer=4)", "fastv(layer=4, drop=0.9)", "fastv(layer=6)"),
    "fuse": ("fuse(r=5, informative=5.0)", "fuse(r=0.35)"),
    "merge": ("merge(r=5, layers=(3,))", "merge(layers=(3,), proportional=False)", "merge(r=4, layers=(2, 3))"),
    "pyramid": ("pyramid(layers=(3,))", "pyramid(layers=(0,), keep=0.25)", "pyramid(layers=(2, 3))"),
    "diverse": ("diverse(keep=0.5)", "diverse(keep=3)"),
    "cls_prune": ("cls_prune(keep=0.5)", "cls_prune(keep=3)"),
    "outlier_tokens": ("outlier_tokens(keep=3)",),
    "hired": ("hired(keep=0.5, early=1)", "hired(crops=(2, 3), alpha=0.3)", "hired(crops=(2, 2), bands=True)"),
    "matryoshka": ("matryoshka(tokens=72)", "matryoshka(tokens=18)"),
    "dominant_contextual": ("dominant_contextual(dominant=3, contextual=1)", "dominant_contextual(dominant=0.5, summed=True)"),
    "cls_ensemble": ("cls_ensemble(keep=0.5, first=1)", "cls_ensemble(first=7)"),
    "temperature": (
        "temperature(value=0.5, layers=(3,))",
        "temperature(kind='position')",
        "temperature(kind='position', learnable=True)",
        "temperature(kind='log', value=0.1)",
        "temperature(kind='log', learnable=True)",
    ),
    "window": ("window(window=5)", "window(window=8, sinks=0)", "window(window=1, sinks=1)", "window(window=6, layers=(0,))"),
    "halo": ("halo(block=3, halo=1)", "halo(block=4, halo=0)", "halo(block=1, halo=2)", "halo(layers=(0,))"),
    "grid": ("grid(size=4, kind='block')", "grid(size=3, kind='grid')", "grid(size=2)", "grid(size=1, kind='block')"),
    "calibrate": (
        "calibrate(beta=0.0, threshold=0.05)",
        "calibrate(heads=((3, 1), (2, 0)))",
        "calibrate(heads=((2, 0),))",
        "calibrate(heads=((3, 3),), layers=None)",
        "calibrate(layers=(0, 1))",
    ),
    "head_reinforce": (
        "head_reinforce(factor=0.5, share=1.0)",
        "head_reinforce(factor=2.0, share=0.25)",
        "head_reinforce(layers=(0,))",
    ),
    "relu_attention": (
        "relu_attention(divide='count')",
        "relu_attention(relu_heads=(1,))",
        "relu_attention(relu_heads=(0,), divide='count')",
        "relu_attention(relu_heads=())",
        "relu_attention(relu_heads=((), (0,), (1,), (1, 0)))",
        "relu_attention(relu_heads=(3,), layers=(3,))",
    ),
    "sigmoid": ("sigmoid(bias=-3.0)", "sigmoid(bias=0.5, layers=(3,))", "sigmoid(layers=(1,))"),
    "routed": (
        "routed(regions=(2, 3), topk=2)",
        "routed(regions=(4, 3), topk=1, layers=(3,))",
        "routed(regions=1, topk=1, lepe=True)",
        "routed(regions=(4, 3), topk=3, lepe=True)",
        "routed(regions=(8, 9), topk=5, scale='all')",
    ),
    "sparsifiner": (
        "sparsifiner(keep=0.1, coefficients=3, scale='heads')",
        "sparsifiner(reduce_tokens=1, reduce_channels=1, threshold=0.5)",
        "sparsifiner(layers=(0,))",
    ),
    "sink_redistribution": (
        "sink_redistribution(p=0.0, rho=1.0, summ=0.0)",
        "sink_redistribution(dims=(7, 100), tau=10)",
        "sink_redistribution(dims=(8,))",
        "sink_redistribution(first_layer=0, except_last=False)",
    ),
}

# Passes that other tests register are not the package's own.
PASSES = {cls.name: cls for cls in available_passes() if cls.__module__.startswith("passes.")}
ALL: dict[str, Pass] = {
    str(setting): setting for name, cls in PASSES.items() for setting in (cls(), *map(parse_pass, SETTINGS.get(name, ())))
}


# A vision tower of two layers whose patches are the image in a text, and the first layers of a language model.
TOWER = tuple(replace(SITES["grid, CLS"], name=f"tower.{layer}", layer=layer, depth=2) for layer in range(2))
LANGUAGE = tuple(
    replace(SITES["image and text"], name=f"text.{layer}", layer=layer, depth=2, stack=1, pictured="tower.1") for layer in range(2)
)
MULTIMODAL = Program(TOWER + LANGUAGE)


@functools.cache
def applied(setting: Pass, case: str) -> Program:
    return setting.apply(Program((SITES[case],)))


def plain(shown: Example) -> torch.Tensor:
    return shown.logits.softmax(-1).nan_to_num(0.0) @ shown.inputs({}).value


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, case: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, msg=lambda text: f"{case}: {text}")


@pytest.mark.parametrize("setting", ALL.values(), ids=ALL)
def test_a_rewritten_site_computes_the_reference(setting: Pass) -> None:
    for case in SITES:
        program, shown = applied(setting, case), example(SITES[case])
        if program.touched:
            parameters = random_parameters(program.sites[0])
            output, reference = shown.output(program, parameters), setting.reference(shown.inputs(parameters))
            stays = ~output.isnan()
            assert stays.any(), case
            assert_equal(output[stays], reference[stays], case)


@pytest.mark.parametrize("case", SITES)
def test_the_recognised_site_computes_plain_attention(case: str) -> None:
    shown = example(SITES[case])
    assert_equal(shown.output(Program((shown.site,)), {}), plain(shown), case)


@pytest.mark.parametrize("setting", ALL.values(), ids=ALL)
def test_a_site_is_rewritten_or_declined_with_a_reason(setting: Pass) -> None:
    for case, site in SITES.items():
        program = applied(setting, case)
        if program.touched:
            assert program.touched == ((site.name, str(setting)),)
            assert not program.declined
            assert program.sites != (site,) or program.token_operations()
        else:
            assert program.sites == (site,)
            assert not program.token_operations()
            ((name, by, reason),) = program.declined
            assert (name, by) == (site.name, str(setting))
            assert len(reason.split()) > 3


@pytest.mark.parametrize("setting", ALL.values(), ids=ALL)
def test_what_a_pass_adds_is_named_once_and_declared(setting: Pass) -> None:
    for case, site in SITES.items():
        body = applied(setting, case).sites[0].body
        results = [operation.result for operation in body.operations]
        parameters = [parameter.name for parameter in body.parameters]
        assert len({*results, *parameters, *site.operands}) == len(results) + len(parameters) + len(site.operands)
        assert setting.adds_parameters() or not parameters


@pytest.mark.parametrize("setting", ALL.values(), ids=ALL)
def test_a_rewritten_site_survives_its_json_form(setting: Pass) -> None:
    for case in SITES:
        for attend in applied(setting, case).sites[0].body.attends():
            again = Attend.from_json(attend.to_json())
            assert (again.score, again.mask, again.groups) == (attend.score, attend.mask, attend.groups), case
            assert (again.normaliser, again.denominator) == (attend.normaliser, attend.denominator), case


@pytest.mark.parametrize("name", PASSES)
def test_some_site_is_rewritten(name: str) -> None:
    settings = [setting for setting in ALL.values() if setting.name == name]
    assert any(applied(setting, case).touched for setting in settings for case in SITES) or any(
        setting.apply(MULTIMODAL).touched for setting in settings
    )


@pytest.mark.parametrize("name", [name for name, cls in PASSES.items() if cls.identity() is not None])
def test_the_identity_setting_changes_nothing(name: str) -> None:
    identity = PASSES[name].identity()
    assert identity is not None
    for case in SITES:
        program, shown = applied(identity, case), example(SITES[case])
        assert_equal(shown.output(program, random_parameters(program.sites[0])), plain(shown), case)
        if identity.fits.reason_against(shown.site) is None:
            assert_equal(identity.reference(shown.inputs({})), plain(shown), case)


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_states_its_facts(name: str) -> None:
    cls = PASSES[name]
    assert any(character.isdigit() for character in cls.paper), "the paper's year"
    assert "=" in cls.formula
    assert "\n" not in cls.formula
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}("), "the docstring is the dataclass's own signature"
    for field in cls.parameters():
        assert field.metadata["help"], field.name
    assert parse_pass(str(cls())) == cls()


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("case", ["dropout", "cross", "map read"])
def test_a_site_that_no_pass_may_change_does_not_fit(name: str, case: str) -> None:
    assert PASSES[name].fits.reason_against(SITES[case])
