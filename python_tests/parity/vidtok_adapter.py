"""Adapter between the recorded outputs of the VidTok reference and this package.

Run by `check_vidtok.py DATA_DIR --adapter vidtok_adapter.py`, whose docstring defines the methods.
A block that is no layer here is "not offered": None.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import vtok_ext as vt
from vtok_ext import layers
from vtok_ext.models import VidTok, VidTokConfig
from vtok_ext.models.vidtok_published import decode_published, encode_published

NET_FIELDS = ("ch", "in_channels", "out_ch", "num_res_blocks", "norm_type", "z_channels")
NET_TUPLES = ("ch_mult", "spatial_ds", "spatial_us", "tempo_ds", "tempo_us")


def build_config(cfg: dict) -> VidTokConfig:
    """Returns our configuration of a released one."""
    net, reg = cfg["net"], cfg["reg_params"]
    fields = {name: net[name] for name in NET_FIELDS}
    fields |= {"version": cfg["version"], "causal": cfg["causal"]}
    if net.get("interpolation_mode") == "trilinear":
        fields["interpolation"] = "linear"
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
        h, _ = self.model.encode_reference(x)
        encoding = self.model.encode(x, frames="reference", compute_loss=True)
        found = {"h": h, "z": encoding.latent, **encoding.losses}
        return found if encoding.indices is None else {**found, "indices": encoding.indices}

    def decode(self, z: Tensor) -> Tensor:
        return self.model.decode(z, frames="reference")

    def decode_indices(self, indices: Tensor) -> Tensor:
        return self.model.decode(indices, frames="reference")

    def encode_chunked(self, x: Tensor, t_chunk_enc: int) -> dict[str, Tensor]:
        encoding = encode_published(self.model, x, chunk_frames=t_chunk_enc, compute_loss=True)
        return {"z": encoding.latent, **encoding.losses}

    def decode_chunked(self, z: Tensor, t_chunk_dec: int, overlap: bool) -> Tensor:
        chunk_frames = t_chunk_dec * self.model.temporal_factor
        return decode_published(self.model, z, chunk_frames=chunk_frames, overlap=overlap)

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
    kind = info["module"].rsplit(".", 1)[-1]
    c_in, c_out = info["x"][1], info["y"][1]
    norm = {"norm_type": "groupnorm" if "groupnorm" in name else "layernorm"}
    temporal = {"temporal": "replicate" if name.startswith("v11.") else "zeros"}
    centred, linear = {"causal": False}, {}
    if "trilinear" in name:  # ".n2" is the length of the first segment
        linear = {"interpolation": "linear", "segment": int(name.split(".n")[1].split(".")[0])}
    attention = {**norm, "causal": not name.startswith("nc.")}
    builders: dict[str, tuple[Callable, Callable[[], nn.Module]]] = {
        "CausalConv1d": (_pixels, lambda: layers.CausalConv1d(c_in, c_out, **temporal)),
        "CausalConv3d": (_video, lambda: layers.CausalConv3d(c_in, c_out, **temporal)),
        "TimeDownsampleResCausal2x": (_video, lambda: layers.TemporalDownsample(c_in, **temporal)),
        "TimeUpsampleResCausal2x": (
            _video,
            lambda: layers.TemporalUpsample(c_in, **temporal, **linear),
        ),
        "ResnetCausalBlock1D": (_pixels, lambda: layers.ResidualBlock1d(c_in, **norm, **temporal)),
        "ResnetCausalBlock": (_video, lambda: layers.ResidualBlock3d(c_in, **norm, **temporal)),
        "TimeDownsampleRes2x": (_video, lambda: layers.TemporalDownsample(c_in, **centred)),
        "TimeUpsampleRes2x": (_video, lambda: layers.TemporalUpsample(c_in, **centred)),
        "ResnetBlock1D": (_pixels, lambda: layers.ResidualBlock1d(c_in, **norm, **centred)),
        "ResnetNoncausalBlock": (_video, lambda: layers.ResidualBlock3d(c_in, **norm, **centred)),
        "AttnBlockWrapper": (_video, lambda: layers.FrameAttention(c_in, **attention)),
        "ResnetBlock": (_frames, lambda: layers.ResidualBlock2d(c_in, c_out, **norm)),
        "Downsample": (_frames, lambda: layers.SpatialDownsample(c_in)),
        "Upsample": (_frames, lambda: layers.SpatialUpsample(c_in)),
        "LayerNorm": (_frames, lambda: layers.NormAct(c_in, act=False)),
        "GroupNorm": (_frames, lambda: layers.GroupNormAct(c_in, act=False)),
    }
    if kind not in builders:
        return None
    run, build = builders[kind]

    def apply(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        layer = build()
        layer.load_state_dict(weights, strict=True)
        return run(layer, x)

    return apply
