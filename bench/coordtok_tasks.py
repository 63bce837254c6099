"""What a process of `models_worker.py` can do with CoordTok: the published op sequence and native.

The published code in plain PyTorch, with the same weights: linear layers of torch.nn, timm's
attention, `multi_head_attention_forward` with its attention weights for the queries, points looked
up by their real coordinates corner by corner, and a clip decoded slice by slice. timm's attention
takes scaled_dot_product_attention; "attention written out" is what it does with that switched off,
as on PyTorch 1. Source: specification of CoordTok, sections 4 to 7.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vtok_ext as vt
from vtok_ext.layers.linear import Linear
from vtok_ext.layers.transformer import MemoryAttention, SelfAttention
from vtok_ext.models.coordtok import CoordTok
from vtok_ext.models.coordtok_config import PLANE_AXES
from vtok_ext.models.coordtok_points import patches_to_video
from vtok_ext.models.coordtok_sampling import random_points, video_patches
from vtok_ext.ops.triplane_gather import triplane_gather_reference

TASKS = ("encode", "decode", "training step")
WRITTEN_OUT = "reference, attention written out"
# Of the published training's first step, which also are those of a slice of its decoder.
NUM_POINTS = 1024


class Native:
    """This package's model."""

    def __init__(self, model: CoordTok) -> None:
        self.model = model

    def encode(self, clip: Tensor) -> dict[str, Tensor]:
        """The planes of clips."""
        return self.model.encode(clip).latent

    def decode(self, planes: dict[str, Tensor], num_slices: int) -> Tensor:
        """A clip [B, 3, T, H, W]."""
        return self.model.decode(planes, num_slices=num_slices)

    def decode_points(self, planes: dict[str, Tensor], points: Tensor) -> Tensor:
        """Patches [B, N, dt * dx * dy * 3] of points [B, N, 3], counted in patches."""
        return self.model.decode_points(planes, points)


class Reference(Native):
    """The published op sequence; changes the modules of `model`."""

    def __init__(self, model: CoordTok, written_out: bool) -> None:
        super().__init__(model)
        for module in model.modules():
            if isinstance(module, Linear):
                module.forward = functools.partial(nn.Linear.forward, module)
            elif isinstance(module, SelfAttention):
                module.forward = functools.partial(timm_attention, module, written_out)
            elif isinstance(module, MemoryAttention):
                module.forward = functools.partial(multi_head_attention, module)

    def encode(self, clip: Tensor) -> dict[str, Tensor]:
        """With the numbers of frames, and the mask made of them, that it always takes."""
        num_frames = torch.full((len(clip),), clip.shape[2], device=clip.device)
        return self.model.encode(clip, num_frames=num_frames).latent

    def decode(self, planes: dict[str, Tensor], num_slices: int) -> Tensor:
        """Every slice by its real coordinates."""
        grid = self.model.config.point_grid()
        axes = [torch.arange(size, device=planes["xy"].device) for size in grid]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, 3)
        points = points.expand(len(planes["xy"]), -1, -1)
        patches = [self.decode_points(planes, part) for part in points.chunk(num_slices, 1)]
        return patches_to_video(torch.cat(patches, 1), grid, self.model.config.dec_patch_size)

    def decode_points(self, planes: dict[str, Tensor], points: Tensor) -> Tensor:
        """By real coordinates, k / (G - 1) for patch k of G."""
        decoder, grid = self.model.decoder, self.model.config.point_grid()
        last = torch.tensor([size - 1 for size in grid], device=points.device)
        coords = points / last
        x = decoder.transformer.patch_embed(
            triplane_gather_reference(*(planes[name] for name in PLANE_AXES), coords)
        )
        t, row, column = (coords * last).long().unbind(-1)
        x = x + decoder.transformer.pos_embed[0, t, row, column].to(x.dtype)
        for layer in decoder.transformer.layers:
            x = layer(x)
        return decoder.projector(decoder.transformer.norm(x))


def timm_attention(
    module: SelfAttention, written_out: bool, x: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Attention among tokens [B, N, D] as timm 1.0.11 computes it."""
    batch, count, dim = x.shape
    qkv = module.qkv(x).reshape(batch, count, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)
    if written_out:
        weights = (query * query.shape[-1] ** -0.5 @ key.mT).softmax(-1)
        mixed = weights @ value
    else:
        mixed = F.scaled_dot_product_attention(query, key, value)
    return module.proj(mixed.transpose(1, 2).reshape(batch, count, dim))


def multi_head_attention(
    module: MemoryAttention, x: Tensor, memory: Tensor, mask: Tensor | None = None
) -> Tensor:
    """What tokens read from a memory, as torch.nn.MultiheadAttention without biases does."""
    query, memory = x.transpose(0, 1), memory.transpose(0, 1)
    padding = None if mask is None else mask[:, 0, 0].to(x.dtype)
    weights, projection = module.in_proj_weight, module.out_proj.weight
    settings = (x.shape[-1], module.num_heads, weights, None, None, None, False, 0.0, projection)
    out, _ = F.multi_head_attention_forward(
        query, memory, memory, *settings, None, module.training, padding
    )
    return out.transpose(0, 1)


def flat(planes: dict[str, Tensor]) -> Tensor:
    """All cells in one vector."""
    return torch.cat([planes[name].flatten() for name in PLANE_AXES])


def tasks(model: Any, settings: dict[str, Any]) -> dict[str, Callable[[], Tensor]]:
    """What a provider can be told to do; each returns its result."""
    name = settings["provider"]
    provider = Reference(model, name == WRITTEN_OUT) if "reference" in name else Native(model)
    model.train(settings["training"])
    config, parameter = model.config, next(model.parameters())
    generator = torch.Generator().manual_seed(1)
    shape = (settings["batch"], 3, *config.video_shape)
    clip = (torch.rand(shape, generator=generator) * 2 - 1).to(parameter)
    planes = {
        plane: torch.randn((len(clip), *config.plane_shape(plane)), generator=generator)
        for plane in PLANE_AXES
    }
    planes = {plane: cells.to(parameter) for plane, cells in planes.items()}
    num_frames = torch.full((len(clip),), clip.shape[2])
    points = random_points(
        num_frames, NUM_POINTS, config.point_grid(), config.dec_patch_size[0], generator
    ).to(parameter.device)
    targets = video_patches(clip, points, config.dec_patch_size).float()
    num_slices = max(1, torch.Size(config.point_grid()).numel() // NUM_POINTS)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        patches = provider.decode_points(provider.encode(clip), points)
        (patches.float() - targets).square().mean().backward()
        return torch.stack([p.grad.float().norm() for p in model.parameters()])

    return {
        "encode": lambda: flat(provider.encode(clip)),
        "decode": lambda: provider.decode(planes, num_slices),
        "training step": step,
    }


def needed_gflop(settings: dict[str, Any]) -> dict[str, float]:
    """Multiplications and additions in 1e9 of the matrix products and convolutions of each task,
    counted on tensors without memory."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = vt.create_model(settings["model"], **settings["overrides"])
    available = tasks(model, {**settings, "provider": WRITTEN_OUT})
    counts = {}
    for task in TASKS:
        model.requires_grad_("step" in task)
        with FlopCounterMode(display=False) as counter:
            available[task]()
        counts[task] = counter.get_total_flops() / 1e9
    return counts
