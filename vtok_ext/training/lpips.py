"""LPIPS as a loss: the network of the metric, see `vtok_ext.metrics.lpips_network`."""

from vtok_ext.metrics.lpips_network import LPIPS, VGG16_CHANNELS, published_lpips, random_lpips

__all__ = ["LPIPS", "VGG16_CHANNELS", "published_lpips", "random_lpips"]
