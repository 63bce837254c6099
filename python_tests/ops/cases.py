"""The ops under test: from this list test_ops.py makes every test that all ops share."""

from case_alpha_blend import ALPHA_BLEND
from case_causal_conv3d import CAUSAL_CONV3D
from case_fsq import FSQ, FSQ_DECODE
from case_fsq_entropy import FSQ_ENTROPY, FSQ_ENTROPY_CLAMPED
from case_norm_act import NORM_ACT, NORM_ACT_STATE, NORM_ACT_WITHOUT_AFFINE
from case_residual_pool import RESIDUAL_POOL
from case_temporal_resample import TEMPORAL_DOWNSAMPLE, TEMPORAL_UPSAMPLE, TEMPORAL_UPSAMPLE_BLEND
from case_triplane_gather import (
    TRIPLANE_GATHER,
    TRIPLANE_GATHER_INDICES,
    TRIPLANE_GATHER_LATTICE,
)

OP_CASES = [
    FSQ,
    FSQ_DECODE,
    FSQ_ENTROPY,
    FSQ_ENTROPY_CLAMPED,
    ALPHA_BLEND,
    TEMPORAL_DOWNSAMPLE,
    TEMPORAL_UPSAMPLE,
    TEMPORAL_UPSAMPLE_BLEND,
    TRIPLANE_GATHER,
    TRIPLANE_GATHER_INDICES,
    TRIPLANE_GATHER_LATTICE,
    NORM_ACT,
    NORM_ACT_STATE,
    NORM_ACT_WITHOUT_AFFINE,
    CAUSAL_CONV3D,
    RESIDUAL_POOL,
]
