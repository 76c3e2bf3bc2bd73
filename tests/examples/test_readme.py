"""The README's code runs as it is printed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_there_is_an_example() -> None:
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "3 rewritten" in printed
    assert ".py" in printed


def test_table_of_passes_is_complete() -> None:
    from rewrite import available_passes

    rows = dict(re.findall(r"^\| `(\w+)[(`].*? \| (\w+) \|", README, flags=re.MULTILINE))
    # Passes that other tests register are not the package's own.
    assert rows == {cls.name: cls.family for cls in available_passes() if cls.__module__.startswith("passes.")}


def test_identity_settings_are_as_the_table_says() -> None:
    from rewrite import available_passes

    for cls in available_passes():
        if cls.__module__.startswith("passes."):
            row = next(line for line in README.splitlines() if line.startswith(f"| `{cls.name}"))
            told = row.rsplit("|", 2)[1].strip().strip("`")
            identity = cls.identity()
            assert told == ("no setting" if identity is None else str(identity).partition("(")[2].rstrip(")").replace("'", '"'))


def test_page_of_passes_is_what_the_registry_says() -> None:
    spec = importlib.util.spec_from_file_location("write_passes", ROOT / "docs" / "write_passes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run make docs"
