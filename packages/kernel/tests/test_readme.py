"""The examples of README.md and docs/recipes.md run as they stand, and give the shapes that their comments state."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
RECIPES = README.parent / "docs" / "recipes.md"


def blocks_of(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


BLOCKS = blocks_of(README)
STATED_SHAPE = re.compile(r"^(out|bias\.grad)\b.*#\s*(\([\d, ]+\))", flags=re.MULTILINE)


def check_after_each_line(block: str) -> str:
    """After each line that states a shape, an assertion of that shape."""
    lines = []
    for line in block.splitlines():
        lines.append(line)
        if stated := STATED_SHAPE.match(line):
            name, shape = stated.groups()
            lines.append(f"assert tuple({name}.shape) == {shape}, ({name!r}, tuple({name}.shape), {shape})")
    return "\n".join(lines)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{index}" for index in range(len(BLOCKS))])
def test_example(block):
    exec(compile(check_after_each_line(block), str(README), "exec"), {})


def test_examples_state_shapes():
    assert len(BLOCKS) >= 9
    assert sum(len(STATED_SHAPE.findall(block)) for block in BLOCKS) >= 9


@pytest.mark.parametrize("block", blocks_of(RECIPES), ids=["rms norm", "ngpt", "swin v2"])
def test_recipe(block):
    """Each asserts that it equals what it replaces."""
    torch.manual_seed(1)
    exec(compile(block, str(RECIPES), "exec"), {})
