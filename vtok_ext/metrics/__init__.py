"""Quality and compression of reconstructions: PSNR, SSIM, codebook usage, chunk seams."""

from .boundary_jump import boundary_jump
from .codebook_usage import CodebookCounter, CodebookUsage, codebook_usage
from .psnr import psnr
from .ssim import ssim

__all__ = [
    "CodebookCounter",
    "CodebookUsage",
    "boundary_jump",
    "codebook_usage",
    "psnr",
    "ssim",
]
