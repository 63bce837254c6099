"""Fast, exact, trainable video tokenizers: VidTok, CoordTok, ProMAG and VTok behind one API.

    import vtok_ext as vt
    model = vt.create_model("vidtok_fsq_causal_488_262144")
    encoding = model.encode(video)          # [B, 3, T, H, W] in [-1, 1]
    video = model.decode(encoding)

Importing needs torch, numpy and the compiled module only.
"""

from pkgutil import extend_path

# `python` started in a source checkout finds this folder first, which holds no compiled module; the
# installed package's folder, where `pip install .` put it, is searched as well.
__path__ = extend_path(__path__, __name__)

from vtok_ext import metrics
from vtok_ext._native import build_info
from vtok_ext._version import __version__
from vtok_ext.diffusers_vae import patch_diffusers, unpatch_diffusers, wrap_diffusers
from vtok_ext.layers import (
    FSQ,
    AlphaBlender,
    CausalConv3d,
    NormAct,
    TemporalDownsample,
    TemporalUpsample,
    TriplaneGather,
)
from vtok_ext.models import (
    Encoding,
    LatentGenerator,
    Output,
    Tokens,
    VideoTokenizer,
    create_generator,
    create_model,
    grow,
    list_generators,
    list_models,
    load_generator,
    load_model,
)
from vtok_ext.ops.alpha_blend import alpha_blend
from vtok_ext.ops.causal_conv3d import causal_conv3d
from vtok_ext.ops.fsq import (
    fsq,
    fsq_codes_to_indices,
    fsq_indices_to_codes,
)
from vtok_ext.ops.fsq_codebook_statistics import fsq_codebook_statistics
from vtok_ext.ops.fsq_entropy import fsq_entropy_loss
from vtok_ext.ops.norm_act import norm_act
from vtok_ext.ops.residual_pool import residual_pool
from vtok_ext.ops.temporal_resample import (
    temporal_downsample_blend,
    temporal_upsample,
    temporal_upsample_blend,
)
from vtok_ext.ops.triplane_gather import triplane_gather

__all__ = [
    "FSQ",
    "AlphaBlender",
    "CausalConv3d",
    "Encoding",
    "LatentGenerator",
    "NormAct",
    "Output",
    "TemporalDownsample",
    "TemporalUpsample",
    "Tokens",
    "TriplaneGather",
    "VideoTokenizer",
    "__version__",
    "alpha_blend",
    "build_info",
    "causal_conv3d",
    "create_generator",
    "create_model",
    "fsq",
    "fsq_codebook_statistics",
    "fsq_codes_to_indices",
    "fsq_entropy_loss",
    "fsq_indices_to_codes",
    "grow",
    "list_generators",
    "list_models",
    "load_generator",
    "load_model",
    "metrics",
    "norm_act",
    "patch_diffusers",
    "residual_pool",
    "temporal_downsample_blend",
    "temporal_upsample",
    "temporal_upsample_blend",
    "triplane_gather",
    "unpatch_diffusers",
    "wrap_diffusers",
]
