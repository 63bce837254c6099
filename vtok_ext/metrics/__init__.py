"""Quality and compression of reconstructions, distances of generated and real clips.

Of pairs: PSNR, SSIM, LPIPS, chunk seams, codebook usage. Of sets: FVD, KVD. Of single videos:
dynamics and detail.
"""

from .boundary_jump import boundary_jump
from .codebook_usage import CodebookCounter, CodebookUsage, codebook_usage
from .dynamics import video_dynamics
from .frequency import sobel_frequency
from .fvd import fvd
from .kvd import kvd
from .lpips import lpips
from .psnr import psnr
from .ssim import ssim

__all__ = [
    "CodebookCounter",
    "CodebookUsage",
    "boundary_jump",
    "codebook_usage",
    "fvd",
    "kvd",
    "lpips",
    "psnr",
    "sobel_frequency",
    "ssim",
    "video_dynamics",
]
