"""Tiny VidToks whose every parameter is random: no branch is hidden by its initialisation."""

import pytest
import torch

import vtok_ext as vt

TINY = {"ch": 8, "num_res_blocks": 1}


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Returns `model` in eval mode with seeded parameters that keep activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("mix_factor"):
                parameter.copy_(0.5 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(float("norm" in name and "weight" in name) + 0.1 * noise)
            else:
                parameter.copy_(noise * 1.3 / parameter[0].numel() ** 0.5)
    return model.eval()


def tiny(name: str, **overrides) -> vt.VideoTokenizer:
    return randomize(vt.create_model(name, **{**TINY, **overrides}))


@pytest.fixture(scope="session")
def fsq_model() -> vt.VideoTokenizer:
    return tiny("vidtok_fsq_causal_488_262144")


@pytest.fixture(scope="session")
def kl_model() -> vt.VideoTokenizer:
    return tiny("vidtok_kl_causal_488_4chn")


@pytest.fixture(params=["fsq", "kl"])
def model(request) -> vt.VideoTokenizer:
    return request.getfixturevalue(f"{request.param}_model")


@pytest.fixture(scope="session")
def build():
    return tiny


@pytest.fixture
def clip():
    """Returns a function (batch, frames, height, width, seed=0) -> random video in [-1, 1]."""

    def make(batch: int, frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand((batch, 3, frames, height, width), generator=generator) * 2 - 1

    return make
