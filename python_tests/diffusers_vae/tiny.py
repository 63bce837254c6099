"""Tiny random configurations of diffusers' video autoencoders, a few thousand parameters each."""

import warnings

import diffusers
import torch

SIZE = 16


def make(name: str, seed: int = 0, **overrides):
    """A model in eval mode whose every parameter is random, biases and norms included."""
    kind, fields = CONFIGS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vae = getattr(diffusers, kind)(**{**fields, **overrides})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in vae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = key.endswith(("gamma", "norm.weight")) or "norm" in key and "weight" in key
            if parameter.dim() <= 1 or is_scale:
                parameter.copy_(float(is_scale) + 0.2 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return vae.eval()


_WAN = {
    "base_dim": 4,
    "z_dim": 2,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "latents_mean": [0.0] * 2,
    "latents_std": [1.0] * 2,
    "scale_factor_spatial": 4,
}
_COG = {
    "block_out_channels": (4, 8, 8),
    "down_block_types": ("CogVideoXDownBlock3D",) * 3,
    "up_block_types": ("CogVideoXUpBlock3D",) * 3,
    "latent_channels": 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_height": 32,
    "sample_width": 32,
}
_HUNYUAN = {
    "block_out_channels": (4, 8, 8, 8),
    "latent_channels": 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
_VIDTOK = {"ch": 4, "ch_mult": [1, 2, 2], "num_res_blocks": 1, "z_channels": 2}
_FSQ = {"regularizer": "fsq", "double_z": False, "codebook_size": 64}

CONFIGS = {
    "wan": ("AutoencoderKLWan", _WAN),
    "wan_residual": (
        "AutoencoderKLWan",
        _WAN
        | {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
        | {"decoder_base_dim": 8, "scale_factor_spatial": 8},
    ),
    "cogvideox": ("AutoencoderKLCogVideoX", _COG),
    "hunyuan_video": ("AutoencoderKLHunyuanVideo", _HUNYUAN),
    "vidtok": ("AutoencoderVidTok", _VIDTOK),
    "vidtok_fsq": ("AutoencoderVidTok", _VIDTOK | _FSQ),
    "vidtok_noncausal": ("AutoencoderVidTok", _VIDTOK | {"is_causal": False}),
}
NAMES = list(CONFIGS)


def video(num_frames: int = 9, size: int = SIZE, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Returns [batch, 3, num_frames, size, size] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, num_frames, size, size, generator=generator) * 2 - 1


def frames_for(name: str) -> int:
    """A clip length that the class takes without loss."""
    return 16 if name == "vidtok_noncausal" else 9


def passes(vae, clip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(moments or codes of `clip`, frames of another latent) by diffusers' own encode and decode.

    The latent is the same in every call, so that differences of encoding do not add to those of
    decoding.
    """
    if type(vae).__name__ == "AutoencoderVidTok":
        factor = vae.temporal_compression_ratio
        if vae.is_causal:
            clip = torch.cat([clip[:, :, :1]] * (factor - 1) + [clip], dim=2)
        encoded = vae.encode(clip)
        raw = encoded[0] if vae.regularizer == "fsq" else encoded.latent_dist.parameters
        return raw, vae.decode(latent_like(raw, 1 + (vae.regularizer != "fsq")))
    raw = vae.encode(clip).latent_dist.parameters
    return raw, vae.decode(latent_like(raw, 2)).sample


def latent_like(raw: torch.Tensor, share: int) -> torch.Tensor:
    """Returns a fixed latent of the shape of `raw` with a `share` of its channels."""
    shape = [raw.shape[0], raw.shape[1] // share, *raw.shape[2:]]
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(raw.dtype)
