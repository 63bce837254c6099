"""A small FSQ VidTok learns four windows of a real clip by heart: >= 28 dB, and the rule holds."""

import pytest
import torch
from tiny_recipe import tiny

from vtok_ext.data.clips import fit
from vtok_ext.data.video import read_clip
from vtok_ext.training.overfit_check import four_clips, overfit_check
from vtok_ext.training.setup import build_task

SMALL = ["model.name=vidtok_fsq_causal_488_262144", "model.overrides.ch=16",
         "model.overrides.ch_mult=[1,1,2,4]"]  # fmt: skip


class Quadrants:
    """17 frames of each quarter of the picture, at four times; windows of one place look alike."""

    def __init__(self, path):
        self.frames = read_clip(path)[0]

    def __len__(self):
        return 4

    def __getitem__(self, place):
        i, half = place[1], self.frames.shape[2] // 2
        top, left = half * (i // 2), half * (i % 2)
        window = self.frames[:, 39 * i : 39 * i + 17, top : top + half, left : left + half]
        return fit(window, 64, 64)


@pytest.mark.slow
def test_four_windows_of_a_real_clip(parity_dir):
    path = parity_dir.parent / "data" / "example.mp4"
    if not path.is_file():
        pytest.skip(f"no clip at {path}")
    torch.manual_seed(0)
    recipe = tiny(*SMALL, "loss.discriminator=none", "loss.perceptual_weight=0", base="smoke_fsq")
    task = build_task(recipe, torch.device("cpu"))
    check = overfit_check(task, four_clips(Quadrants(path)), steps=80)
    print(f"{check.least_psnr:.1f} dB, margin {check.least_margin:.1f} dB, {check.seconds:.0f} s")
    assert check.passed and check.least_psnr >= 28
