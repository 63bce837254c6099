"""VToks of a few thousand parameters, for several test files."""

import torch

import vtok_ext as vt
from vtok_ext.models import VTok

TINY = {
    "image_size": 16,
    "encoder_patch": 4,
    "encoder_dim": 16,
    "encoder_depth": 1,
    "encoder_heads": 2,
    "token_dim": 12,
    "num_queries": 2,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "decoder_patch": (2, 4, 4),
    "sampling_steps": 2,
}


def tiny(**overrides) -> VTok:
    torch.manual_seed(0)
    return vt.create_model("vtok_small", **{**TINY, **overrides}).eval()


def tiny_fsq(**overrides) -> VTok:
    return tiny(levels=(4, 4, 4), **overrides)
