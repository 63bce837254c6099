"""Drop-in nn.Modules for causal video networks; tensors are [B, C, T, H, W].

Transformer blocks take tokens [B, N, D].
"""

from vtok_ext.layers.alpha_blend import AlphaBlender, alpha_blend
from vtok_ext.layers.attention import FrameAttention
from vtok_ext.layers.causal_conv3d import CausalConv1d, CausalConv3d, FrameConv2d
from vtok_ext.layers.fsq import FSQ
from vtok_ext.layers.kl import kl_posterior
from vtok_ext.layers.lfq import LFQ
from vtok_ext.layers.norm_act import GroupNormAct, NormAct, norm_act
from vtok_ext.layers.residual import ResidualBlock1d, ResidualBlock2d, ResidualBlock3d
from vtok_ext.layers.spatial_resample import SpatialDownsample, SpatialUpsample
from vtok_ext.layers.temporal_resample import TemporalDownsample, TemporalUpsample
from vtok_ext.layers.transformer import QueryBlock, TransformerBlock
from vtok_ext.layers.triplane_gather import TriplaneGather
from vtok_ext.layers.vq import VQ

__all__ = [
    "FSQ",
    "LFQ",
    "VQ",
    "AlphaBlender",
    "CausalConv1d",
    "CausalConv3d",
    "FrameAttention",
    "FrameConv2d",
    "GroupNormAct",
    "NormAct",
    "QueryBlock",
    "ResidualBlock1d",
    "ResidualBlock2d",
    "ResidualBlock3d",
    "SpatialDownsample",
    "SpatialUpsample",
    "TemporalDownsample",
    "TemporalUpsample",
    "TransformerBlock",
    "TriplaneGather",
    "alpha_blend",
    "kl_posterior",
    "norm_act",
]
