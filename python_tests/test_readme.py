"""The Python snippets of README.md and of docs/ run, in order and in one namespace each, as a
reader would type them."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"
DOCS = sorted((README.parent / "docs").glob("*.md"))


def test_snippets_run_and_do_what_their_comments_say():
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) >= 3
    torch.manual_seed(0)
    scope = {}
    for snippet in snippets:
        exec(compile(snippet, str(README), "exec"), scope)
    assert list(scope["tokens"].ids.shape) == [1, 5, 8, 8]
    assert scope["restored"].shape == scope["video"].shape
    assert sum(frames.shape[2] for frames in scope["frames"]) == scope["video"].shape[2]
    assert list(scope["indices"].shape) == [2, 3, 16, 16]
    assert list(scope["pictures"].shape) == [1, 3, 2, 128, 128]
    assert list(scope["corner"].shape) == [1, 3, 1, 20, 30]


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_snippets_of_docs_run(page):
    torch.manual_seed(0)
    scope = {}
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(snippet, str(page), "exec"), scope)
