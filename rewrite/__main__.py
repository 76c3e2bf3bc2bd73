"""``python -m rewrite``: what passes and backends there are, and what passes do to a model's answers."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from rewrite.evaluating import command
from rewrite.ir import Pass, RewriteError, available_passes, pass_class


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    parser = argparse.ArgumentParser(prog="rewrite", description="A compiler for attention.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("passes", help="table of the passes there are")
    one = commands.add_parser("pass", help="one pass: its parameters, paper and formula")
    one.add_argument("name")
    commands.add_parser("backends", help="what can run the rewritten graphs and the kernels here")
    command.add_arguments(commands.add_parser("evaluate", help="accuracy, cost and time of passes on a model, over their parameters"))
    chosen = parser.parse_args(argv)
    console = Console()
    try:
        if chosen.command == "passes":
            console.print(passes_table())
        elif chosen.command == "pass":
            _print_pass(console, pass_class(chosen.name))
        elif chosen.command == "evaluate":
            command.run(chosen, console)
        else:
            console.print(_backends_table())
    except (RewriteError, NotADirectoryError) as error:
        print(f"rewrite: {error}", file=sys.stderr)
        return 2
    return 0


def passes_table() -> Table:
    """Every registered pass: name, family, whether it needs training, paper."""
    table = Table(title="Passes", title_justify="left")
    for heading in ("name", "family", "training-free", "parameters", "paper"):
        table.add_column(heading, overflow="fold")
    for cls in available_passes():
        parameters = ", ".join(f"{field.name}={field.default!r}" for field in cls.parameters())
        table.add_row(cls.name, cls.family, "yes" if cls.training_free else "no", parameters, cls.paper)
    return table


def _print_pass(console: Console, cls: type[Pass]) -> None:
    console.print(f"[bold]{cls.name}[/bold] ({cls.family}, {'training-free' if cls.training_free else 'needs training'})")
    console.print(f"paper: {cls.paper}", highlight=False)
    console.print(f"formula: {cls.formula}", highlight=False, markup=False)
    identity = cls.identity()
    console.print(f"changes nothing at: {identity if identity is not None else 'no setting'}", markup=False)
    table = Table("parameter", "type", "default", "meaning")
    for field in cls.parameters():
        table.add_row(
            field.name,
            str(field.type),
            "required" if field.default is dataclasses.MISSING else repr(field.default),
            field.metadata.get("help", ""),
        )
    console.print(table)
    console.print(inspect.getdoc(cls) or "", markup=False)


def _backends_table() -> Table:
    import triton

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device: kernels are emitted and compiled ahead of time"
    table = Table("what", "here")
    table.add_row("graphs run with", ", ".join(["eager", *torch._dynamo.list_backends()]))
    table.add_row("attention on CPU tensors", f"torch {torch.__version__} operators")
    table.add_row("attention on CUDA tensors", f"emitted Triton (triton {triton.__version__}); {cuda}")
    return table


if __name__ == "__main__":
    sys.exit(main())
