"""Fewer tokens on the CPU: models with tokens pruned or merged, and the unmodified ones, each eager and compiled by Inductor.

    python benchmarks/tokens.py [--only DeiT]

DeiT-S with `evit` and `merge`, of one picture and of eight: a whole forward pass. A LLaVA-1.5-shaped model (CLIP-L/336 in full, 576 visual
tokens, a language model of LLaMA's shape shrunk in width and depth) of which 90 % of the visual tokens never enter the language model: time
to first token (tower, projector, prefill), the prefill alone (that, less the time of the unmodified tower and projector in the same round),
and steps of decoding behind it. Every variant is run in turns in one process; a ratio is the median over rounds of (time of the unmodified
model / time of the variant) within a round. What choosing itself takes (scores, the choice, gathers) is timed by itself, on what it
is given in the rewritten graph, as a share of the time of that graph. Results go to benchmarks/results/tokens.md as found.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from rewrite import rewrite

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from torchvision_or_not import let_transformers_import

RESULTS = Path(__file__).parent / "results" / "tokens.md"
BACKENDS = ("eager", "inductor")
UNMODIFIED = "unmodified"
# A small vocabulary: a large one only adds the same output layer to both sides.
IMAGE_TOKEN, VOCABULARY = 999, 1000
# LLaVA-1.5's template has 35 tokens in front of the image; a short question follows.
TEXT_BEFORE, TEXT_AFTER = 35, 29
PATCH = 14
PRUNED = "cls_prune(keep=0.1)"
# One picture leaves matrix products so few rows that these do not get faster as their rows get fewer; papers measure with many.
BATCHES = (1, 8)

Inputs = dict[str, torch.Tensor]
# What one run of a variant took, in seconds, by what was done.
Seconds = dict[str, float]
Run = Callable[[], Seconds]


@dataclass(frozen=True)
class Sizes:
    """The models' sizes, decoding steps, and how long rounds go on: so many seconds, but not fewer than the least number of rounds."""

    picture: int
    vision_hidden: int
    vision_layers: int
    text_hidden: int
    text_layers: int
    steps: int
    seconds: float
    least: int


# Of LLaMA-7B's 4,096 by 32; wide and deep enough that its prefill takes longer than the tower, as LLaMA-7B's does by far.
FULL = Sizes(336, 1024, 24, 2048, 12, steps=4, seconds=20.0, least=3)
SMALL = Sizes(84, 64, 3, 64, 2, steps=2, seconds=0.1, least=2)


@dataclass(frozen=True)
class Case:
    """A model and the ways to run it, by name; predicted: by pass list and what is done, how many times as fast it is to be.

    choosing: by pass list, runs the rewritten model once and gives the share of its time that choosing takes.
    """

    name: str
    runs: dict[str, Run]
    predicted: dict[tuple[str, str], float]
    choosing: dict[str, Callable[[], float]]


# Where the code of choosing lies: Dynamo says of every operator which code it comes from.
CHOOSING = str(Path("rewrite") / "tokens")
# The operators of choosing that are not written there.
CHOOSING_OPERATORS = ("attention_statistic", "kept_positions")


def chooses(node: fx.Node) -> bool:
    """Whether a node of a rewritten graph is of choosing: what computes and is not just a number or the graph's input and output."""
    called = node.op.startswith("call_")
    return called and (CHOOSING in (node.stack_trace or "") or any(name in str(node.target) for name in CHOOSING_OPERATORS))


class Recorder(fx.Interpreter):
    """Runs a graph and keeps what its nodes are."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = result = super().run_node(n)
        return result


def alone(module: fx.GraphModule) -> tuple[fx.GraphModule, list[str]]:
    """The nodes of choosing as a module of their own, and the names of the nodes that it is given."""
    graph, copies, given = fx.Graph(), dict[fx.Node, fx.Node](), list[str]()
    chosen = [node for node in module.graph.nodes if chooses(node)]
    for node in chosen:
        for read in node.all_input_nodes:
            if read not in copies:
                with graph.inserting_before(next(iter(graph.nodes), None)):
                    copies[read] = graph.placeholder(read.name)
                given.insert(0, read.name)
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in chosen if not all(map(chooses, node.users))))
    return fx.GraphModule(module, graph), given


def choosing_share(model: nn.Module, inputs: Inputs, one: str) -> Callable[[], float]:
    """Runs the model under a pass, and what chooses by itself on what it is given there: the share of the time that this takes."""
    spent: list[float] = []

    def backend(module: fx.GraphModule, given: Any) -> Callable[..., Any]:
        choosing, names = alone(module)

        def run(*values: Any) -> Any:
            recorder = Recorder(module)
            result = recorder.run(*values)
            for part, read in ((module, values), (choosing, [recorder.values[name] for name in names])):
                begun = time.perf_counter()
                part(*read)
                spent.append(time.perf_counter() - begun)
            return result

        return run

    changed = rewrite(sharing(model), passes=one, example_inputs=inputs, backend=backend)

    def run() -> float:
        spent.clear()
        changed(**inputs)
        return sum(spent[1::2]) / sum(spent[::2])

    return run


def sharing(model: nn.Module) -> nn.Module:
    """A copy with the same parameters."""
    return copy.deepcopy(model, {id(one): one for one in (*model.parameters(), *model.buffers())})


def variants(model: nn.Module, inputs: Inputs, passes: tuple[str, ...]) -> dict[str, nn.Module]:
    """The model unmodified and under each pass list, by name, eager and compiled."""
    made: dict[str, nn.Module] = {f"{UNMODIFIED}, eager": model, f"{UNMODIFIED}, inductor": sharing(model)}
    made[f"{UNMODIFIED}, inductor"].compile()
    for one in passes:
        for backend in BACKENDS:
            made[f"{one}, {backend}"] = rewrite(model, passes=one, example_inputs=inputs, backend=backend)
    return made


def counted(model: Any) -> tuple[int, int]:
    """Multiply-adds of a rewritten model's forward pass, before and after, as its report has them."""
    report = model.rewrite_report
    return report.total_before.multiply_adds, report.total_after.multiply_adds


def predicted(model: Any) -> float:
    """How many times as fast a rewritten model's forward pass is to be, as its report has it."""
    report = model.rewrite_report
    ratio: float = report.predicted.before / report.predicted.after
    return ratio


def deit(sizes: Sizes, batch: int) -> Case:
    """DeiT-S at 224 px."""
    let_transformers_import()
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    model = DeiTForImageClassificationWithTeacher(DeiTConfig(**shape)).eval()
    inputs = {"pixel_values": torch.randn(batch, 3, 224, 224)}
    passes = ("evit(keep=0.7)", "merge(r=13)")
    made = variants(model, inputs, passes)
    faster = {(one, "forward pass"): predicted(made[f"{one}, eager"]) for one in passes}

    def run(one: nn.Module) -> Seconds:
        begun = time.perf_counter()
        one(**inputs)
        return {"forward pass": time.perf_counter() - begun}

    choosing = {one: choosing_share(model, inputs, one) for one in passes}
    return Case(f"DeiT-S, 224 px, batch {batch}", {name: partial(run, one) for name, one in made.items()}, faster, choosing)


def llava(sizes: Sizes) -> tuple[nn.Module, Inputs]:
    """A LLaVA-1.5-shaped model with random weights, and a prompt with one picture."""
    let_transformers_import()
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=sizes.text_hidden, intermediate_size=8 * sizes.text_hidden // 3, num_hidden_layers=sizes.text_layers,
        num_attention_heads=max(2, sizes.text_hidden // 128), vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=sizes.vision_hidden, intermediate_size=4 * sizes.vision_hidden, num_hidden_layers=sizes.vision_layers,
        num_attention_heads=max(2, sizes.vision_hidden // 64), image_size=sizes.picture, patch_size=PATCH,
    )  # fmt: skip
    visual = (sizes.picture // PATCH) ** 2
    # LLaVA-1.5 reads the last layer but one. Dynamo drops the unread last one, which would be counted as a gain of the pass.
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, image_seq_length=visual, vision_feature_layer=-1
    )
    ids = torch.randint(3, IMAGE_TOKEN, (1, TEXT_BEFORE + visual + TEXT_AFTER))
    ids[:, TEXT_BEFORE : TEXT_BEFORE + visual] = IMAGE_TOKEN
    picture = torch.randn(1, 3, sizes.picture, sizes.picture)
    return LlavaForConditionalGeneration(config).eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": picture}


def multimodal(sizes: Sizes) -> Case:
    """The LLaVA-1.5-shaped model, with and without 90 % of its visual tokens."""
    model, inputs = llava(sizes)
    made = variants(model, inputs, (PRUNED,))
    towers: dict[str, Callable[..., Any]] = {
        "eager": model.get_image_features,
        "inductor": torch.compile(sharing(model).get_image_features),
    }
    with FlopCounterMode(display=False) as counter:
        model.get_image_features(pixel_values=inputs["pixel_values"])
    tower = counter.get_total_flops() // 2
    before, after = counted(made[f"{PRUNED}, eager"])
    # The report's prediction is of the whole call; the prefill's is the ratio of multiply-adds.
    faster = {(PRUNED, "time to first token"): predicted(made[f"{PRUNED}, eager"]), (PRUNED, "prefill"): (before - tower) / (after - tower)}

    def run(one: nn.Module, features: Callable[..., Any]) -> Seconds:
        begun = time.perf_counter()
        features(pixel_values=inputs["pixel_values"])
        seen = time.perf_counter()
        given = one(**inputs, use_cache=True)
        first = time.perf_counter()
        mask, cache = inputs["attention_mask"], given.past_key_values
        token = given.logits[:, -1:].argmax(-1)
        for _ in range(sizes.steps):
            mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
            given = one(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
            token, cache = given.logits[:, -1:].argmax(-1), given.past_key_values
        decoded = time.perf_counter() - first
        return {"time to first token": first - seen, "prefill": first - seen - (seen - begun), "step of decoding": decoded / sizes.steps}

    runs = {name: partial(run, one, towers[name.split(", ")[-1]]) for name, one in made.items()}
    visual = (sizes.picture // PATCH) ** 2
    choosing = {PRUNED: choosing_share(model, inputs, PRUNED)}
    return Case(f"LLaVA-1.5-shaped, {visual} visual tokens of {visual + TEXT_BEFORE + TEXT_AFTER}", runs, faster, choosing)


def measure(runs: dict[str, Run], sizes: Sizes) -> dict[str, list[Seconds]]:
    """Every round by variant; rounds start at another one each time.

    Each variant is run twice before anything counts: Dynamo makes lengths dynamic, and compiles anew, in the second.
    """
    names = list(runs)
    for name in names:
        runs[name]()
        runs[name]()
    taken: dict[str, list[Seconds]] = {name: [] for name in names}
    started, done = time.perf_counter(), 0
    while done < sizes.least or time.perf_counter() - started < sizes.seconds:
        first = done % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(runs[name]())
        done += 1
    return taken


def shares(case: Case, least: int) -> list[str]:
    """The lines that say what choosing itself takes: medians over `least` runs behind two that do not count."""
    lines = ["### choosing itself (scores, choice, gathers), of the time of the rewritten forward pass", ""]
    for one, run in case.choosing.items():
        run(), run()
        lines.append(f"- {one}: {statistics.median(run() for _ in range(max(least, 5))):.1%}")
    return [*lines, ""]


def rows(case: Case, taken: dict[str, list[Seconds]]) -> list[str]:
    """The lines of one case's tables, one for each thing that is done."""
    lines = [f"## {case.name}"]
    for what in taken[f"{UNMODIFIED}, eager"][0]:
        lines += ["", f"### {what}", "", "| variant | median ms | x of unmodified eager | x of unmodified inductor | predicted x |"]
        lines += ["|---|---:|---:|---:|---:|"]
        for name, spent in taken.items():
            own = [each[what] for each in spent]
            baselines = [[each[what] for each in taken[f"{UNMODIFIED}, {backend}"]] for backend in BACKENDS]
            ratios = [statistics.median(base / mine for base, mine in zip(each, own, strict=True)) for each in baselines]
            ratio_told = case.predicted.get((name.rsplit(", ", 1)[0], what))
            said = f"{ratio_told:.2f}" if ratio_told else ""
            lines.append(
                f"| {name} | {statistics.median(own) * 1e3:.1f} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + f" | {said} |"
            )
    return [*lines, ""]


def heading(threads: int, load: float) -> list[str]:
    """What was measured, when, with what and on what."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return [
        "# CPU: fewer tokens, against unmodified models",
        "",
        f"{datetime.date.today()}; Python {platform.python_version()}, {packages}; {cpu or platform.processor()}, {os.cpu_count()} cores, "
        f"{threads} threads; load average {load:.1f} when the run began (shared machine where that is much above 0).",
        "",
        "float32, no gradients, random weights. A ratio above 1 is faster than that baseline: the median over rounds of baseline",
        "/ variant within a round. Predicted: seconds before / after of the whole call, as the report has them",
        "(of the prefill, multiply-adds before / after). Written by benchmarks/tokens.py.",
        "",
    ]


def main() -> None:
    """Measure both cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    parser.add_argument("--small", action="store_true", help="a tiny multimodal model and few rounds: does it run; nothing is written")
    parser.add_argument("--only", default="", help="cases whose names begin so: DeiT or LLaVA; nothing is written")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    sizes, console = SMALL if chosen.small else FULL, Console()
    cases = {**{f"DeiT, batch {batch}": partial(deit, batch=batch) for batch in BATCHES}, "LLaVA": multimodal}
    lines = heading(chosen.threads, os.getloadavg()[0])
    with torch.no_grad():
        for name, build in cases.items():
            if not name.startswith(chosen.only):
                continue
            case = build(sizes)
            found = rows(case, measure(case.runs, sizes)) + shares(case, sizes.least)
            console.print("\n".join(found), markup=False)
            lines += found
            torch.compiler.reset()
    if not (chosen.small or chosen.only):
        RESULTS.write_text("\n".join(lines))
        console.print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
