"""The repository itself: the README's tree and examples, links, and what every text may not contain."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = sorted(path for path in ROOT.rglob("*.md") if not {".nox", "runs", ".pytest_cache"} & set(path.parts))


def tracked_files() -> list[str]:
    """Files that git knows, or all files where this is no git checkout."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return done.stdout.split("\n")[:-1]


def tree_of_readme() -> dict[str, bool]:
    """{path: is a folder} of the README's tree, whose levels are two spaces each."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"## Layout\n\n```\n(.*?)```", text, flags=re.DOTALL)
    assert block, "README.md: expected a section '## Layout' with a code block"
    entries, parents = {}, []
    for line in block.group(1).splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name.rstrip("/")]
        entries["/".join(parents)] = name.endswith("/")
    return entries


def test_tree_names_what_exists():
    for path, is_folder in tree_of_readme().items():
        assert (ROOT / path).is_dir() if is_folder else (ROOT / path).is_file(), path


def test_tree_is_complete():
    """A folder of which one entry is shown is shown whole; so is the root."""
    tree = tree_of_readme()
    opened = {""} | {path.rpartition("/")[0] for path in tree}
    for file in tracked_files():
        parts = file.split("/")
        for level in range(len(parts)):
            parent, path = "/".join(parts[:level]), "/".join(parts[: level + 1])
            hidden = parts[level].startswith(".git")
            if parent in opened and not hidden:
                assert path in tree, f"README.md: the tree shows {parent or 'the root'} but not {path}"


def test_root_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_readme_names_real_sessions():
    sessions = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), flags=re.MULTILINE))
    for text in TEXTS:
        named = set(re.findall(r"nox -s (\w+)", text.read_text()))
        assert named <= sessions, f"{text.relative_to(ROOT)}: no such session {named - sessions}"


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(text):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text.read_text()):
        assert (text.parent / target).exists(), f"{text.relative_to(ROOT)}: {target}"
