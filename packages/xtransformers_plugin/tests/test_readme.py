"""The README's examples run as they stand, in one namespace, and its table is the table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from xtransformers_cosine_sim import disable, install_flag, seam, table_markdown, uninstall_flag

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(not seam.queries_arrive_unit(), reason="the examples mean x-transformers 2.26 and newer")
def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["disable"] is disable
    assert names["install_flag"] is install_flag
    assert names["uninstall_flag"] is uninstall_flag


def test_table_is_the_table():
    """On failure: put the output of xtransformers_cosine_sim.table_markdown() between the marks."""
    found = re.search(r"<!-- table -->\n(.*?)\n<!-- end of table -->", README.read_text(), flags=re.DOTALL)
    assert found
    assert found.group(1) == table_markdown()
