"""VTok learns clips by heart, tells them apart by its tokens, and generalises."""

import pytest
import torch
from tiny_vtok import tiny

import vtok_ext as vt
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.metrics import psnr


def clips(first, count, frames=5, size=16):
    stack = [procedural_clip(frames, size, size, seed=first + i) for i in range(count)]
    return torch.stack(stack).float() / 127.5 - 1


def fit(model, video, steps, batch, lr=4e-3):
    torch.manual_seed(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for step in range(steps):
        chosen = torch.arange(step * batch, (step + 1) * batch) % len(video)
        loss = model(video[chosen]).encoding.losses["flow_loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def errors(decoded, video):
    """Mean squared error of every reconstruction [B] to every clip [B]."""
    return (decoded[:, None] - video[None]).square().mean(dim=(2, 3, 4, 5))


@torch.no_grad()
def test_four_clips_are_told_apart():
    """decode(encode(A)) is at least 6 dB closer to A than to any other clip."""
    model = tiny(stride=1, decoder_dim=48, decoder_depth=2, token_dim=24)
    t, y, x = torch.meshgrid(torch.arange(4), torch.arange(16), torch.arange(16), indexing="ij")
    phase = torch.arange(4.0).view(4, 1, 1, 1, 1) * 1.6 + torch.arange(3.0).view(3, 1, 1, 1)
    slope = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(4, 1, 1, 1, 1)
    video = torch.sin(phase + 0.25 * y * slope + 0.2 * x + 0.4 * t)  # [4, 3, 4, 16, 16]
    with torch.enable_grad():
        fit(model, video, steps=300, batch=4)
    error = errors(model.decode(model.encode(video), num_steps=4), video)
    own, best_other = error.diagonal(), (error + torch.eye(4) * 1e9).amin(1)
    assert (10 * torch.log10(best_other / own) >= 6).all(), error


@torch.no_grad()
def test_clips_of_one_key_frame_are_told_apart():
    """Residual tokens are used: a square begins in the middle and goes one of four ways. A decoder
    that found them by attention alone stood at 3 dB after as many steps."""
    model = tiny(stride=1, decoder_dim=48, decoder_depth=2, token_dim=24, residual_pool="grid")
    video = torch.full((4, 3, 16, 16, 16), -1.0)
    for clip, (down, right) in enumerate([(0, 1), (0, -1), (1, 0), (-1, 0)]):
        for t in range(16):
            y, x = 6 + t * 4 // 15 * down, 6 + t * 4 // 15 * right
            video[clip, :, t, y : y + 4, x : x + 4] = 1.0
    with torch.enable_grad():
        fit(model, video, steps=250, batch=4)
    error = errors(model.decode(model.encode(video), num_steps=2), video)
    own, best_other = error.diagonal(), (error + torch.eye(4) * 1e9).amin(1)
    assert (10 * torch.log10(best_other / own) >= 5).all(), error


@pytest.mark.slow
@torch.no_grad()
def test_held_out_clips_beat_the_mean_frame():
    """The baseline is the mean frame of the very clips that are measured."""
    shape = {"decoder_dim": 64, "decoder_depth": 3, "token_dim": 48, "encoder_dim": 32}
    model = vt.create_model("vtok_small", **{**tiny(stride=1, **shape).config.to_dict()})
    with torch.enable_grad():
        fit(model, clips(100, 256), steps=1500, batch=16, lr=2e-3)
    video = clips(10_000, 16)
    decoded = model.decode(model.encode(video), num_steps=1)
    baseline = video.mean(dim=(0, 2), keepdim=True).expand_as(video)
    assert psnr(decoded, video) > psnr(baseline, video) + 1
