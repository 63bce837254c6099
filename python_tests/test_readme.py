"""The Python snippets of README.md and of docs/ run, in order and in one namespace each, as a
reader would type them."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# Those with an assertion of what they do have a test of their own.
DOCS = sorted(set((ROOT / "docs").glob("*.md")) - {ROOT / "docs" / "generation.md"})


def run_snippets(path):
    """Returns the names that the snippets of a file leave behind."""
    snippets = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    torch.manual_seed(0)
    scope = {"snippets": len(snippets)}
    for snippet in snippets:
        exec(compile(snippet, str(path), "exec"), scope)
    return scope


def test_generation():
    scope = run_snippets(ROOT / "docs" / "generation.md")
    assert scope["made"].shape == scope["latents"][:2].shape
    assert scope["videos"].shape == (2, 3, 9, 32, 32)
    assert all(float(x.abs().max()) < 0.1 for x in scope["by_flow"].values())
    assert scope["by_diffusion"]["yt"].shape == (2, 3, 8, 4)
    assert scope["distance"].value > 0 and scope["dynamics"].shape == (6,)


def test_snippets_run_and_do_what_their_comments_say():
    scope = run_snippets(ROOT / "README.md")
    assert scope["snippets"] >= 3
    assert list(scope["tokens"].ids.shape) == [1, 5, 8, 8]
    assert scope["restored"].shape == scope["video"].shape
    assert sum(frames.shape[2] for frames in scope["frames"]) == scope["video"].shape[2]
    assert list(scope["indices"].shape) == [2, 3, 16, 16]
    assert list(scope["pictures"].shape) == [1, 3, 2, 128, 128]
    assert list(scope["corner"].shape) == [1, 3, 1, 20, 30]


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_snippets_of_docs_run(page):
    run_snippets(page)
