"""The Python snippets of README.md and of each page of docs/ run, in order and in one namespace
per file, as a reader would type them; so do the commands that train and run generators."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers import import_or_skip

ROOT = Path(__file__).parent.parent
NEEDS = {"diffusers": "diffusers"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run_and_do_what_their_comments_say(page):
    if page.stem in NEEDS:
        import_or_skip(NEEDS[page.stem])
    torch.manual_seed(0)
    scope = {}
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(snippet, str(page), "exec"), scope)
    CHECKS.get(page.stem, lambda scope: None)(scope)


def check_readme(scope):
    assert list(scope["tokens"].ids.shape) == [1, 5, 8, 8]
    assert scope["restored"].shape == scope["video"].shape
    assert sum(frames.shape[2] for frames in scope["frames"]) == scope["video"].shape[2]
    assert list(scope["indices"].shape) == [2, 3, 16, 16]
    assert list(scope["pictures"].shape) == [1, 3, 2, 128, 128]
    assert list(scope["corner"].shape) == [1, 3, 1, 20, 30]


def check_generation(scope):
    assert scope["made"].shape == scope["latents"][:2].shape
    assert scope["videos"].shape == (2, 3, 9, 32, 32)
    assert all(float(x.abs().max()) < 0.1 for x in scope["by_flow"].values())
    assert scope["by_diffusion"]["yt"].shape == (2, 3, 8, 4)
    assert scope["distance"].value > 0 and scope["dynamics"].shape == (6,)


@pytest.mark.parametrize(("page", "count"), [("README.md", 3), ("docs/generation.md", 7)])
def test_commands_of_generators_run(page, count, tmp_path, monkeypatch):
    """From the first `vtok train smoke_kl` to the last line that needs it, in fewer steps."""
    from vtok_ext.cli.app import run

    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text()
    commands = re.findall(r"^    vtok ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    first = next(i for i, line in enumerate(commands) if line.startswith("train smoke_kl"))
    for line in commands[first : first + count]:
        words = shlex.split(line.replace("\\\n", " "), comments=True)
        fewer = ["run.steps=2"] if words[0] == "train" else ["--steps", "2"] * ("--steps" in words)
        assert run([*words, *fewer]) == 0, line
    assert (tmp_path / "kl" / "model").is_dir()


def check_drop_in(scope):
    assert scope["indices"].shape == (2, 3, 8, 8)


CHECKS = {"README": check_readme, "drop_in": check_drop_in, "generation": check_generation}
