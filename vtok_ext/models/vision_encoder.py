"""Image encoders for VTok: pictures [B, 3, H, W] in [-1, 1] to feature maps [B, C, h, w].

    SmallViT            patches, fixed sine-cosine positions, pre-norm transformer, layer norm
    HuggingFaceEncoder  any CLIP, SigLIP, DINO or ViT tower of `transformers`

Source: Dosovitskiy et al. (arXiv 2010.11929); positions as in MAE (He et al., arXiv 2111.06377).
"""

from __future__ import annotations

import json
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.layers.transformer import TransformerBlock
from vtok_ext.models._optional import require
from vtok_ext.models._persistence import check_source
from vtok_ext.models.sit_network import sincos_2d

# How towers were normalised in training, as (mean, standard deviation) of values in [0, 1]. DINOv2
# uses ImageNet's, SigLIP maps to [-1, 1].
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5,) * 3, (0.5,) * 3)
_NORMALIZATION = {
    "clip_vision_model": _CLIP,
    "siglip_vision_model": _HALF,
    "siglip2_vision_model": _HALF,
    "vit": _HALF,
}

# Of a configuration in transformers, what another folder or version would change.
_OF_THE_READER = ("_name_or_path", "transformers_version")


@runtime_checkable
class VisionEncoder(Protocol):
    """What VTok asks of an image encoder.

    Attributes:
        name: says in messages what it is.
        frozen: whether it keeps its weights; then it also runs without gradients.
        channels: C.
        image_size: height and width that pictures are resized to.
        patch: height and width of what a place of the map stands for.
    """

    name: str
    frozen: bool
    channels: int
    image_size: int
    patch: int

    def __call__(self, images: Tensor) -> Tensor:
        """Returns features [B, C, h, w] of pictures [B, 3, H, W] in [-1, 1]."""


class SmallViT(nn.Module):
    """Returns features [B, C, H / patch, W / patch]; see `VisionEncoder`.

    Args:
        image_size: what pictures are resized to before they come here; any other multiple of the
            patch works too.
        patch, dim, depth, heads: of the transformer.
        frozen: see `VisionEncoder`.
    """

    def __init__(
        self,
        image_size: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        *,
        frozen: bool = True,
    ) -> None:
        super().__init__()
        self.name, self.channels = f"vit {dim}x{depth}, patch {patch}", dim
        self.image_size, self.patch = image_size, patch
        self.embed = nn.Conv2d(3, dim, patch, stride=patch)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.frozen = frozen
        self.requires_grad_(not frozen)

    def forward(self, images: Tensor) -> Tensor:
        """Returns features [B, C, h, w] of pictures [B, 3, H, W] in [-1, 1]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            rows, columns = (size // self.patch for size in images.shape[2:])
            return self.encode_patches(images).mT.unflatten(2, (rows, columns))

    def encode_patches(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Returns features [B, N, C] of all patches, or of those `kept` [B, n] in their order.

        Args:
            images: [B, 3, H, W], sizes multiples of the patch.
            kept: indices of patches; the others are not seen.
        """
        if images.dim() != 4 or any(size % self.patch for size in images.shape[2:]):
            raise ValueError(
                f"SmallViT: images must be [B, 3, H, W] with H, W multiples of {self.patch}, "
                f"got {list(images.shape)}"
            )
        x = self.embed(images)
        positions = sincos_2d(x.shape[2], x.shape[3], self.channels).to(x)
        x = x.flatten(2).mT + positions
        if kept is not None:
            x = x.gather(1, kept[..., None].expand(-1, -1, self.channels))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class HuggingFaceEncoder(nn.Module):
    """A vision tower of `transformers` as a VisionEncoder; always frozen.

    Args:
        tower: the vision model: a CLIP or SigLIP vision tower, DINOv2, ViT, ... whose output has
            `last_hidden_state` [B, 1 + h w, C] or [B, h w, C].
        layer: which hidden state to take, counted as transformers does: 0 is what goes into the
            first layer, -1 the output, after its norm; -2 is what LLaVA takes of CLIP.

    Raises:
        ValueError: a model that is no vision transformer, or has no such layer.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, tower: nn.Module, layer: int = -1) -> None:
        super().__init__()
        config: Any = tower.config
        missing = [n for n in ("hidden_size", "image_size", "patch_size") if not hasattr(config, n)]
        if missing:
            raise ValueError(
                f"HuggingFaceEncoder: tower must have hidden_size, image_size and patch_size, got "
                f"{config.model_type} without {', '.join(missing)}"
            )
        depth = config.num_hidden_layers
        if not -depth - 1 <= layer <= depth:
            raise ValueError(
                f"HuggingFaceEncoder: layer must be in {-depth - 1}..{depth} for a "
                f"{config.model_type} of {depth} layers, got {layer}"
            )
        self.tower: Any = tower.requires_grad_(False)
        self.layer, self.frozen = layer, True
        self.name = f"{config.model_type} tower"
        self.channels, self.image_size = config.hidden_size, config.image_size
        self.patch = int(config.patch_size)
        mean, deviation = _NORMALIZATION.get(config.model_type, _IMAGENET)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer(
            "deviation", torch.tensor(deviation).view(1, 3, 1, 1), persistent=False
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Returns features [B, C, h, w] of pictures [B, 3, H, W] in [-1, 1]."""
        x = ((images + 1) / 2 - self.mean) / self.deviation
        output = self.tower(pixel_values=x, output_hidden_states=self.layer != -1)
        states = output.last_hidden_state if self.layer == -1 else output.hidden_states[self.layer]
        rows, columns = (size // self.patch for size in x.shape[2:])
        if states.dim() != 3 or states.shape[1] < rows * columns:
            raise ValueError(
                f"HuggingFaceEncoder: tower must give a feature for each of {rows} x {columns} "
                f"patches, got {list(states.shape)} of a {self.tower.config.model_type}, which "
                "masks or merges them"
            )
        # Class and register tokens stand in front of the patches.
        return states[:, states.shape[1] - rows * columns :].mT.unflatten(2, (rows, columns))

    def train(self, mode: bool = True) -> HuggingFaceEncoder:
        """Returns itself, in eval mode: a frozen tower has no dropout."""
        return super().train(False)

    def config_json(self) -> str:
        """Returns the tower's configuration, from which `tower_from_json` builds it.

        It says nothing of where the tower came from or which version of transformers read it.
        """
        fields = self.tower.config.to_dict()
        own = {name: value for name, value in fields.items() if name not in _OF_THE_READER}
        return json.dumps(own, sort_keys=True, default=str)


def load_tower(source: str) -> nn.Module:
    """Returns the vision tower in folder `source` or of that hub id, with its weights, in float32
    whatever they are stored in.

    Raises:
        ImportError: transformers is not installed, or not one for this torch.
        FileNotFoundError: there is no such folder, and no hub id is of this form.
    """
    transformers = require("load_tower", "transformers")
    check_source("load_tower", source)
    model = transformers.AutoModel.from_pretrained(source)
    return getattr(model, "vision_model", model).float()


def tower_from_json(text: str) -> nn.Module:
    """Returns the tower of a `config_json`, with random weights. Raises ImportError, ValueError."""
    transformers = require("tower_from_json", "transformers")
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"tower_from_json: text must be JSON, got {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ValueError("tower_from_json: text must be a JSON object with model_type")
    kind = fields.pop("model_type")
    fields.pop("auto_map", None)  # names code in a repository: only transformers' own is run
    config = transformers.AutoConfig.for_model(kind, **fields)
    model = transformers.AutoModel.from_config(config)
    return getattr(model, "vision_model", model).float()


def resized(images: Tensor, size: int) -> Tensor:
    """Returns pictures [B, 3, size, size]: bilinear, low-passed where they shrink.

    Args:
        images: [B, 3, H, W].
        size: in pixels.
    """
    if images.shape[2:] == (size, size):
        return images
    # On a CPU there is no antialiased resizing of half types.
    is_half = images.dtype in (torch.bfloat16, torch.float16)
    wide = images.float() if is_half else images
    resampled = F.interpolate(wide, (size, size), mode="bilinear", antialias=True)
    return resampled.to(images.dtype)
