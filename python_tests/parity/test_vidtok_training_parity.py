"""Recorded losses, discriminators, LPIPS and moving averages of the VidTok reference.

The recordings of these have no comparison in check_vidtok.py; its functions regenerate the weights.
"""

import importlib.util
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from vtok_ext.training.adversarial import discriminator_loss, generator_loss
from vtok_ext.training.discriminators import PatchDiscriminator2d, PatchDiscriminator3d
from vtok_ext.training.ema import ExponentialMovingAverage
from vtok_ext.training.losses import LossConfig, TokenizerLoss, batches_of_global_steps
from vtok_ext.training.lpips import LPIPS

DISCRIMINATORS = {"2d": PatchDiscriminator2d, "3d": PatchDiscriminator3d}
# The recorded global step and the batch it belongs to.
STEPS = {0: 0, 20000: 10000, 20001: batches_of_global_steps(20001)}


@pytest.fixture(scope="module")
def recorded(parity_dir):
    """(scalars, tensors, the module check_vidtok)."""
    spec = importlib.util.spec_from_file_location("check_vidtok", parity_dir / "check_vidtok.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    scalars = json.loads((parity_dir / "vidtok" / "units.json").read_text())
    tensors = load_file(parity_dir / "vidtok" / "units.safetensors")
    halves = {torch.float16}
    tensors = {k: v.float() if v.dtype in halves else v for k, v in tensors.items()}
    return scalars, tensors, module


def weights(tensors, prefix):
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def near(actual, expected):
    torch.testing.assert_close(
        torch.as_tensor(actual).detach().float(), torch.as_tensor(expected).float(),
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_discriminator(recorded, kind):
    scalars, tensors, _ = recorded
    unit = f"disc{kind}"
    network = DISCRIMINATORS[kind](8)
    network.load_state_dict(weights(tensors, f"{unit}/w/"), strict=True)
    near(network(tensors[f"{unit}/x"]), tensors[f"{unit}/y_train"])
    after = network.eval()(tensors[f"{unit}/x"])
    near(after, tensors[f"{unit}/y_eval_after_one_train_forward"])
    full = {name: list(value.shape) for name, value in DISCRIMINATORS[kind]().state_dict().items()}
    assert full == scalars[unit]["full_shapes"]


def test_adversarial_terms(recorded):
    scalars, tensors, _ = recorded
    real, fake = tensors["lossfn/real"], tensors["lossfn/fake"]
    near(discriminator_loss(real, fake, "hinge"), scalars["lossfn"]["hinge"])
    near(discriminator_loss(real, fake, "vanilla"), scalars["lossfn"]["vanilla"])
    near(generator_loss(fake), scalars["lossfn"]["non_saturate_gen"])


class SquaredDistance(nn.Module):
    """What the recording has in place of LPIPS."""

    def forward(self, a, b):
        return (a - b).square().mean((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_whole_loss(recorded, kind):
    """Generator and discriminator terms at three global steps, one instance, state carried over."""
    scalars, tensors, _ = recorded
    unit = f"loss{kind}"
    config = LossConfig(discriminator=kind, discriminator_width=8, logvar=0.25)
    loss = TokenizerLoss(config, SquaredDistance())
    loss.discriminator.load_state_dict(weights(tensors, f"{unit}/disc/"), strict=True)
    weight = tensors[f"{unit}/last_w"].clone().requires_grad_(True)
    regularization = {"aux_loss": torch.tensor(1.5), "kl_loss": torch.tensor(2e5)}
    for step, batch in STEPS.items():
        video = tensors[f"{unit}/x"]
        bias = tensors[f"{unit}/last_b"]
        reconstruction = F.conv3d(tensors[f"{unit}/feat"], weight, bias, padding=1)
        total, seen = loss.generator_terms(video, reconstruction, regularization, weight, batch)
        want = scalars[f"{unit}.gen.gs{step}"]
        active = step == 20001
        near(total, want["loss"])
        for name, key in (("nll_loss", "nll_loss"), ("rec_loss", "rec_loss")):
            near(seen[name], want[f"train/{key}"])
        near(seen["perceptual_loss"], want["train/p_loss"])
        assert active == ("g_loss" in seen) == (want["train/disc_factor"] == 1)
        if active:
            near(seen["g_loss"], want["train/g_loss"])
            near(seen["d_weight"], want["train/d_weight"])
        gradients = torch.autograd.grad(total, [weight, loss.logvar])
        near(gradients[0].norm(), want["grad_last_norm"])
        near(gradients[1], want["grad_logvar"])

        total, seen = loss.discriminator_terms(video, reconstruction, batch)
        want = scalars[f"{unit}.disc.gs{step}"]
        near(total, want["loss"])
        assert total.requires_grad == active
        near(loss.lecam.real_mean, want["lecam_real_ema"])
        near(loss.lecam.fake_mean, want["lecam_fake_ema"])
        near(seen["lecam_loss"], want["train/lecam_loss"])
        near(seen["d_base_loss"], want["train/non_saturated_d_loss"])
        near(seen["logits_real"], want["train/logits_real"])
        near(seen["logits_fake"], want["train/logits_fake"])


def test_lpips(recorded):
    scalars, tensors, check = recorded
    network = LPIPS()
    state = network.state_dict()
    shapes = {name: list(value.shape) for name, value in state.items()}
    assert shapes == scalars["lpips"]["keys"]
    for name, value in state.items():
        if not name.startswith("scaling_layer."):
            seeded = check.seeded_weight(name, tuple(value.shape), "lpips")
            value.copy_(seeded.abs() if name.startswith("lin") else seeded)
    with torch.no_grad():
        near(network(tensors["lpips/a"], tensors["lpips/b"]), tensors["lpips/y"])


def test_moving_averages(recorded):
    scalars, _, check = recorded
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model.load_state_dict(check.seeded_state(model.state_dict(), "ema"))
    averages = ExponentialMovingAverage(model, 0.999)
    for i, want in enumerate(scalars["ema"]["history"]):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * (i + 1)
        averages.update()
        assert averages.num_updates == want["num_updates"][0]
        for name, value in averages.averages.items():
            near(value.flatten(), want[name.replace(".", "")])
