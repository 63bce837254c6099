"""Windows of a real clip are learnt by heart to >= 28 dB, and the rule of overfitting holds: by a
small FSQ VidTok, and by a small CoordTok, whose windows have 64 frames."""

import pytest
import torch
from tiny_recipe import tiny

from vtok_ext.data.clips import fit
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.data.video import read_clip
from vtok_ext.training.overfit_check import four_clips, overfit_check
from vtok_ext.training.recipe_file import load_recipe
from vtok_ext.training.setup import build_task

SMALL = ["model.name=vidtok_fsq_causal_488_262144", "model.overrides.ch=16",
         "model.overrides.ch_mult=[1,1,2,4]"]  # fmt: skip

# 624 cells of 8 numbers for 64 frames.
SMALL_COORDTOK = [
    "model.overrides={video_shape: [64, 64, 64], latent_resolution: [20, 12, 12], "
    "latent_patch_size: [4, 4, 4], enc_embed_dim: 128, enc_num_layers: 2, enc_num_heads: 4, "
    "enc_patch_num_layers: 1, enc_patch_size: [8, 16, 16], dec_embed_dim: 192, dec_num_layers: 4, "
    "dec_num_heads: 4, dec_patch_size: [1, 8, 8]}",
    "data={num_frames: 64, height: 64, width: 64}",
    "loss.num_points=256",
]


@pytest.fixture
def real_clip(parity_dir):
    path = parity_dir.parent / "data" / "example.mp4"
    if not path.is_file():
        pytest.skip(f"no clip at {path}")
    return path


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


class LongWindows:
    """64 frames of two quarters of the picture at two times, and two procedural clips."""

    def __init__(self, path):
        frames = read_clip(path)[0]
        half = frames.shape[2] // 2
        real = [frames[:, :64, :half, :half], frames[:, 72:136, half:, half:]]
        self.clips = [fit(window, 64, 64) for window in real]
        for seed in (0, 1):
            options = {"seed": seed, "motion": "erratic", "dtype": torch.uint8}
            self.clips.append(procedural_clip(64, 64, 64, **options))

    def __len__(self):
        return 4

    def __getitem__(self, place):
        return self.clips[place[1]]


def overfitted(recipe, clips, steps):
    torch.manual_seed(0)
    task = build_task(recipe, torch.device("cpu"))
    check = overfit_check(task, four_clips(clips), steps=steps)
    print(f"{check.least_psnr:.1f} dB, margin {check.least_margin:.1f} dB, {check.seconds:.0f} s")
    return task.networks[task.exported], check


@pytest.mark.slow
def test_vidtok_learns_four_windows(real_clip):
    recipe = tiny(*SMALL, "loss.discriminator=none", "loss.perceptual_weight=0", base="smoke_fsq")
    _, check = overfitted(recipe, Quadrants(real_clip), 160)
    assert check.passed and check.least_psnr >= 28


@pytest.mark.slow
def test_coordtok_learns_four_long_windows(real_clip):
    recipe = load_recipe("smoke_coordtok", SMALL_COORDTOK)
    model, check = overfitted(recipe, LongWindows(real_clip), 1400)
    assert model.config.num_tokens <= 640 and model.config.latent_channels == 8
    assert check.passed and check.least_psnr >= 28
