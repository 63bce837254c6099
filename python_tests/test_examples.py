"""The examples of docs/examples run; the snippets of docs/ are those of test_readme."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import import_or_skip

from vtok_ext.data.video import VideoReader, VideoWriter

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.slow  # importing diffusers in a process of its own takes most of it
@pytest.mark.parametrize("kind", ["AutoencoderKLWan", "AutoencoderKLCogVideoX"])
def test_example_of_a_patched_autoencoder(kind, tmp_path):
    import_or_skip("diffusers")
    clip, out = tmp_path / "clip.mp4", tmp_path / "out.mp4"
    source = (torch.rand(3, 10, 16, 16) * 255).to(torch.uint8)
    with VideoWriter(clip, height=16, width=16, fps=10) as writer:
        writer.write(source)
    script = DOCS / "examples" / "diffusers_vae.py"
    command = [sys.executable, str(script), str(clip), "-o", str(out), "--kind", kind]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{kind}: 10 frames of 16x16" in done.stdout
    error = float(re.search(r"largest difference: (\S+) of", done.stdout)[1])
    assert error < 1e-5
    with VideoReader(clip) as reader:
        expected = next(reader.chunks(10)).frames
    with VideoReader(out) as reader:
        pair = next(reader.chunks(10)).frames
    assert list(pair.shape) == [3, 10, 16, 32]
    # The left half is the input, up to another round of compression.
    assert (pair[..., :16].float() - expected.float()).abs().mean() < 12
