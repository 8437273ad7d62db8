"""The README's examples run as they stand, and give the shapes that their comments state."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
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
