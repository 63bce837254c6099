"""A CoordTok that trains in no time."""

import torch

import vtok_ext as vt


def tiny_coordtok():
    """Returns a CoordTok of clips of 8 frames of 16x16, of seed 0."""
    torch.manual_seed(0)
    sizes = {"video_shape": (8, 16, 16), "enc_patch_size": (4, 8, 8), "dec_patch_size": (1, 8, 8)}
    sizes |= {"latent_resolution": (8, 4, 4), "latent_patch_size": (4, 2, 2), "latent_channels": 3}
    thin = {
        f"{p}_{k}": v
        for p in ("enc", "dec")
        for k, v in {"embed_dim": 16, "num_layers": 1, "num_heads": 2}.items()
    }
    return vt.create_model("coordtok_small_128", **sizes, **thin, enc_patch_num_layers=1)
