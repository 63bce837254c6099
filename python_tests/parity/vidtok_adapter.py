"""Adapter between the recorded outputs of the VidTok reference and this package.

Run by `check_vidtok.py DATA_DIR --adapter vidtok_adapter.py`, whose docstring defines the methods.
What is not built is "not offered": NotImplementedError for a configuration, None for a block.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import vtok_ext as vt
from vtok_ext import layers
from vtok_ext.models.vidtok import VidTok, VidTokConfig

NET_FIELDS = ("ch", "in_channels", "out_ch", "num_res_blocks", "norm_type", "z_channels")
NET_TUPLES = ("ch_mult", "spatial_ds", "spatial_us", "tempo_ds", "tempo_us")


def build_config(cfg: dict) -> VidTokConfig:
    """Returns our configuration of a released one; NotImplementedError where there is none."""
    if cfg["version"] != "1.0" or not cfg["causal"]:
        raise NotImplementedError(f"version {cfg['version']}, causal {cfg['causal']}")
    net, reg = cfg["net"], cfg["reg_params"]
    fields = {name: net[name] for name in NET_FIELDS}
    fields |= {name: tuple(net[name]) for name in NET_TUPLES if name in net}
    if cfg["reg"] == "fsq":
        fields |= {
            "levels": tuple(reg["levels"]),
            "entropy_weight": reg["entropy_loss_weight"],
            "entropy_annealing_steps": reg["entropy_loss_annealing_steps"],
            "entropy_annealing_factor": reg["entropy_loss_annealing_factor"],
            "commitment_weight": reg["commitment_loss_weight"],
        }
    return VidTokConfig.from_dict({"regularizer": cfg["reg"], **fields})


class Adapter:
    def __init__(self, cfg: dict) -> None:
        self.model = VidTok(build_config(cfg)).eval()

    def load(self, state_dict: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state_dict, strict=True)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        h = self.model.encode_reference(x)
        encoding = self.model.encode(x, frames="reference", compute_loss=True)
        found = {"h": h, "z": encoding.latent, **encoding.losses}
        return found if encoding.indices is None else {**found, "indices": encoding.indices}

    def decode(self, z: Tensor) -> Tensor:
        return self.model.decode(z)

    def decode_indices(self, indices: Tensor) -> Tensor:
        return self.model.decode(indices)

    def grad(self, x: Tensor, w: Tensor):
        x = x.clone().requires_grad_(True)
        out = self.model(x, frames="reference", compute_loss=True)
        losses = out.encoding.losses
        loss = 10 * (out.reconstruction * w).mean()
        loss = loss + losses.get("aux_loss", 0.0) + 1e-4 * losses.get("kl_loss", 0.0)
        named = dict(self.model.named_parameters())
        dx, *grads = torch.autograd.grad(loss, [x, *named.values()])
        norms = {name: grad.norm() for name, grad in zip(named, grads, strict=True)}
        return loss.detach(), dx, norms

    @staticmethod
    def unit(name: str, info: dict) -> Callable[[dict[str, Tensor], Tensor], Tensor] | None:
        return _unit(name, info)

    @staticmethod
    def fsq(levels: list[int], z: Tensor, n_steps: int) -> tuple[Tensor, Tensor, Tensor]:
        codes, indices, losses = vt.FSQ(levels)(z, n_steps, compute_loss=True)
        return codes, indices, losses["aux_loss"]

    @staticmethod
    def psnr(a: Tensor, b: Tensor) -> float:
        return float(vt.metrics.psnr(a, b, value_range=(0.0, 1.0)))

    @staticmethod
    def ssim(a: Tensor, b: Tensor) -> float:
        return float(vt.metrics.ssim(a, b, value_range=(0.0, 1.0)))

    @staticmethod
    def keys(cfg: dict) -> dict[str, tuple[int, ...]]:
        config = build_config(cfg)
        with torch.device("meta"):
            return {name: tuple(v.shape) for name, v in VidTok(config).state_dict().items()}


# Blocks run on [B, C, T, H, W]; recorded inputs of the others become that and back.
def _pixels(layer: nn.Module, x: Tensor) -> Tensor:  # x [N, C, T]
    return layer(x[..., None, None]).flatten(2)


def _frames(layer: nn.Module, x: Tensor) -> Tensor:  # x [N, C, H, W]
    return layer(x.unsqueeze(2)).squeeze(2)


def _video(layer: nn.Module, x: Tensor) -> Tensor:  # x [B, C, T, H, W]
    return layer(x)


def _unit(name: str, info: dict):
    if "trilinear" in name or name.startswith("nc."):
        return None
    kind = info["module"].rsplit(".", 1)[-1]
    c_in, c_out = info["x"][1], info["y"][1]
    temporal = "replicate" if name.startswith("v11.") else "zeros"
    norm = "groupnorm" if "groupnorm" in name else "layernorm"
    builders = {
        "CausalConv1d": (_pixels, lambda: layers.CausalConv1d(c_in, c_out, temporal=temporal)),
        "CausalConv3d": (_video, lambda: layers.CausalConv3d(c_in, c_out, temporal=temporal)),
        "TimeDownsampleResCausal2x": (
            _video,
            lambda: layers.TemporalDownsample(c_in, temporal=temporal),
        ),
        "TimeUpsampleResCausal2x": (
            _video,
            lambda: layers.TemporalUpsample(c_in, temporal=temporal),
        ),
        "ResnetCausalBlock1D": (
            _pixels,
            lambda: layers.ResidualBlock1d(c_in, norm_type=norm, temporal=temporal),
        ),
        "ResnetCausalBlock": (
            _video,
            lambda: layers.ResidualBlock3d(c_in, norm_type=norm, temporal=temporal),
        ),
        "AttnBlockWrapper": (_video, lambda: layers.FrameAttention(c_in, norm_type=norm)),
        "ResnetBlock": (_frames, lambda: layers.ResidualBlock2d(c_in, c_out, norm_type=norm)),
        "Downsample": (_frames, lambda: layers.SpatialDownsample(c_in)),
        "Upsample": (_frames, lambda: layers.SpatialUpsample(c_in)),
    }
    if kind not in builders:
        return None
    run, build = builders[kind]

    def apply(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        layer = build()
        layer.load_state_dict(weights, strict=True)
        return run(layer, x)

    return apply
