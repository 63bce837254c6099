"""ProMAG's base: a causal MAGVIT-v2 style autoencoder with a continuous latent, 4x in time.

    encoder  conv_in, per level residual blocks and a step down, norm_out, 1x1x1 conv_out -> moments
    decoder  1x1x1 conv_in, the mirror image, norm_out, conv_out

1 + 4 n frames give 1 + n latents: 17 -> 9 -> 5. Group norms divide by the root of the mean square
of a group within one frame and subtract nothing; so the network stays causal, and growing leaves no
spots in the corners. No code or weights of ProMAG are public: this is built from its description,
and what that leaves open is named in `promag_config` and below as ours.
Source: ProMAG (arXiv 2501.05442); MAGVIT-v2 (arXiv 2310.05737).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtok_ext.layers import CausalConv3d, GroupNormAct, kl_posterior
from vtok_ext.layers._state import State, StateFlow
from vtok_ext.layers.kl import Generators
from vtok_ext.layers.volume import NormFactory, VolumeBlock, VolumeDown, VolumeUp
from vtok_ext.models.grid import GridTokenizer
from vtok_ext.models.promag_config import PRESETS, ProMAGConfig, num_groups

# Ours: standard deviations of 0.14 at the start, under fresh means of about 0.3. With the usual 1
# noise drowns them, and small trainings spend most of their steps on getting rid of it.
LOGVAR_START = -4.0


def promag_norm(config: ProMAGConfig) -> NormFactory:
    """Returns what makes the normalisations of a model; statistics per frame and eps 1e-6: ours."""

    def norm(channels: int) -> nn.Module:
        return GroupNormAct(
            channels, num_groups=num_groups(channels), subtract_mean=config.subtract_mean
        )

    return norm


class Level(nn.Module):
    """Residual blocks of one resolution, then a step to the next one where there is one."""

    def __init__(self, blocks: list[VolumeBlock], step: nn.Module | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.step = step

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns x [B, C, T, H, W] one level on, or `(x, state)`."""
        flow = StateFlow(state, return_state)
        for i, block in enumerate(self.block):
            x = flow(f"block.{i}", block, x)
        return flow.result(x if self.step is None else flow("step", self.step, x))


class Encoder(nn.Module):
    """Returns the moments [B, 2 z, t, H / 8, W / 8] of frames [B, 3, T, H, W] in [-1, 1].

    With `return_state=True`, `(moments, state)`: chunks of f frames continue a stream exactly.
    """

    def __init__(self, config: ProMAGConfig) -> None:
        super().__init__()
        widths, norm, kt = config.widths, promag_norm(config), config.kernel_frames
        self.conv_in = CausalConv3d(3, widths[0], (kt, 3, 3))
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            inputs = [widths[max(0, level - 1)]] + [width] * (config.num_res_blocks - 1)
            blocks = [VolumeBlock(c, width, norm, kt) for c in inputs]
            step = None
            if level < len(widths) - 1:
                step = VolumeDown(width, time=config.time_stride(level), space=2, kt=kt)
            self.down.append(Level(blocks, step))
        for _ in range(config.extra_halvings):
            block = VolumeBlock(widths[-1], widths[-1], norm)
            self.down.append(Level([block], VolumeDown(widths[-1], time=2, space=1)))
        self.norm_out = norm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_channels, 1)
        with torch.no_grad():
            for parameter in self.conv_out.parameters():  # log variances come behind the means
                parameter[config.z_channels :] = LOGVAR_START if parameter.dim() == 1 else 0.0

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the moments of `x`, or `(moments, state)`."""
        flow = StateFlow(state, return_state)
        x = flow("conv_in", self.conv_in, x.contiguous(memory_format=torch.channels_last_3d))
        for i, level in enumerate(self.down):
            x = flow(f"down.{i}", level, x)
        return flow.result(flow("conv_out", self.conv_out, self.norm_out(x)))


class Decoder(nn.Module):
    """Returns 1 + (t - 1) f frames [B, 3, T, 8 H, 8 W] of a latent [B, z, t, H, W].

    With `return_state=True`, `(frames, state)`; later chunks of a stream give f t frames.
    """

    def __init__(self, config: ProMAGConfig) -> None:
        super().__init__()
        widths, norm, kt = config.widths, promag_norm(config), config.kernel_frames
        self.conv_in = CausalConv3d(config.z_channels, widths[-1], 1)
        self.up = nn.ModuleList()
        for _ in range(config.extra_halvings):
            block = VolumeBlock(widths[-1], widths[-1], norm)
            self.up.append(Level([block], VolumeUp(widths[-1], time=2, space=1)))
        for level in reversed(range(len(widths))):
            width, before = widths[level], widths[min(level + 1, len(widths) - 1)]
            inputs = [before] + [width] * (config.num_res_blocks - 1)
            blocks = [VolumeBlock(c, width, norm, kt) for c in inputs]
            step = None
            if level > 0:
                step = VolumeUp(width, time=config.time_stride(level - 1), space=2, kt=kt)
            self.up.append(Level(blocks, step))
        self.norm_out = norm(widths[0])
        self.conv_out = CausalConv3d(widths[0], 3, (kt, 3, 3))

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the frames of latent `x`, or `(frames, state)`."""
        flow = StateFlow(state, return_state)
        x = flow("conv_in", self.conv_in, x.contiguous(memory_format=torch.channels_last_3d))
        for i, level in enumerate(self.up):
            x = flow(f"up.{i}", level, x)
        return flow.result(flow("conv_out", self.conv_out, self.norm_out(x)))


class ProMAG(GridTokenizer):
    """Returns ProMAG's base; see `VideoTokenizer` and `GridTokenizer` for what it does.

    `vt.grow` doubles its temporal factor. `frames="reference"` takes clips of 1 + k f frames only,
    as the paper does.
    """

    config: ProMAGConfig
    config_class = ProMAGConfig
    presets = PRESETS

    def __init__(self, config: ProMAGConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantizer = None
        if config.freeze_image_encoder:
            self._freeze_image_encoder()

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return self.config.z_channels

    @property
    def temporal_factor(self) -> int:
        """f: frames per latent frame."""
        return self.config.temporal_factor

    @property
    def spatial_factor(self) -> int:
        """s: pixels per latent position along H and W."""
        return 2 ** (len(self.config.ch_mult) - 1)

    @property
    def is_causal(self) -> bool:
        """Whether a latent depends on its own and earlier frames only."""
        return True

    def encode_chunk(self, video: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the moments of the next frames of a stream, or `(moments, state)`."""
        return self.encoder(video, state, return_state)

    def decode_chunk(self, latent: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the frames of the next latents of a stream, or `(frames, state)`."""
        return self.decoder(latent, state, return_state)

    def encode_reference(self, video: Tensor) -> tuple[Tensor, int]:
        """Returns the moments and the frame count of a clip of 1 + k f frames."""
        if (video.shape[2] - 1) % self.temporal_factor:
            raise ValueError(
                f"encode: video must have 1 + k * {self.temporal_factor} frames with "
                f"frames='reference', got {list(video.shape)}"
            )
        return self.encode_chunk(video), video.shape[2]

    def decode_reference(self, latent: Tensor, num_frames: int | None = None) -> Tensor:
        """Returns the frames of a latent, the `num_frames` of it."""
        return self.decode_chunk(latent)

    def regularize(
        self,
        raw: Tensor,
        *,
        sample: bool = False,
        generator: Generators = None,
        step: int = 0,
        compute_loss: bool = False,
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Returns latent, None for indices, and losses of moments."""
        latent, losses = kl_posterior(raw, sample, generator)
        return latent, None, losses

    def tiled(self, tile: Any = "auto", *, mode: str = "exact", **options: Any) -> Any:
        """Returns a view in tiles; an exact one is tiled inside each layer, see `promag_tiling`.

        Args:
            tile: (height, width) in pixels, rounded up to multiples of the spatial factor.
            mode, **options: as `GridTokenizer.tiled`.

        Raises:
            ValueError: an option is not as described.
        """
        if mode != "exact":
            return super().tiled(tile, mode=mode, **options)
        from vtok_ext.models.promag_tiling import exact_view  # it builds on this file

        return exact_view(self, tile)

    @classmethod
    def inflate(cls, image_model: ProMAG, *, freeze_image_encoder: bool = False, **fields: Any):
        """Returns a video model that starts as `image_model` applied to the frames it keeps.

        The 2-D kernels become the last slice in time, which sees the present frame; the earlier
        slices are zero. Latent i then is the image latent of frame f i, and frames between are
        copies. Off in all presets: the paper's description of its initialisation is ambiguous.

        Args:
            image_model: made with `is_image=True`.
            freeze_image_encoder: keep what the encoder has from it as it is while training (ours:
                norms, biases, and the last slice of each kernel; weight decay must be 0).
            **fields: of the configuration to change: time_levels (default 2), subtract_mean.

        Raises:
            ValueError: not an image model, or a field that changes its shapes.
        """
        if not image_model.config.is_image:
            raise ValueError(f"inflate: image_model must have is_image=True, got {image_model}")
        options = {"time_levels": 2, "is_image": False, **fields}
        config = image_model.config.replace(**options, freeze_image_encoder=freeze_image_encoder)
        model = cls(config)
        weights = image_model.state_dict()
        for name, target in model.state_dict().items():
            source = weights.get(name)
            if source is None or source.shape[:2] != target.shape[:2]:
                raise ValueError(f"inflate: fields must keep the shape of {name}, got {fields}")
            if target.dim() == 5 and target.shape[2] > 1:
                target.zero_()[:, :, -1] = source[:, :, 0]
            else:
                target.copy_(source)
        return model

    def _freeze_image_encoder(self) -> None:
        """Nothing but the slices of the encoder's kernels that look back is trained."""
        for parameter in self.encoder.parameters():
            if parameter.dim() == 5 and parameter.shape[2] > 1:
                parameter.register_hook(_without_present)
            else:
                parameter.requires_grad_(False)


def _without_present(grad: Tensor) -> Tensor:
    """Returns the gradient of a kernel [O, I, kt, kh, kw] with zeros in its last slice."""
    grad = grad.clone()
    grad[:, :, -1] = 0
    return grad
