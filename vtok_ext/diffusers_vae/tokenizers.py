"""VideoTokenizers on the parameters of diffusers' video autoencoders.

    WanTokenizer           the first frame, then 4 frames at a time: an exact stream
    CogVideoXTokenizer     9 frames, then 8 at a time: its group norm looks at all frames of a unit,
                           so the units are part of the model; a stream has the same ones
    HunyuanVideoTokenizer  whole clips: group norm and attention look at all of one
    VidTok                 this package's own model, for AutoencoderVidTok

frames="preserve" extends a clip at its tail to whole units and runs them one by one, without the
spatial or temporal tiling of diffusers; frames="reference" is `encode` and `decode` of diffusers
with whatever tiling is enabled. Latents are those of `encode`, not scaled for a diffusion model.
"""

from __future__ import annotations

import dataclasses
import json
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtok_ext.diffusers_vae._folder import VAE_CLASSES, vae_class_of
from vtok_ext.diffusers_vae._patching import patch as patch_layers
from vtok_ext.diffusers_vae._patching import vae_class_name
from vtok_ext.layers._state import State, owned
from vtok_ext.layers.kl import kl_posterior
from vtok_ext.models._config import ModelConfig
from vtok_ext.models._optional import require
from vtok_ext.models.base import VideoTokenizer
from vtok_ext.models.grid import GridTokenizer
from vtok_ext.models.latent_statistics import read_statistics_file, write_statistics_file
from vtok_ext.models.vidtok_diffusers import from_diffusers

_WAITING = "waiting"  # in a state: latents [B, C, t, h, w] that fill no unit yet


@dataclasses.dataclass(frozen=True)
class DiffusersVaeConfig(ModelConfig):
    """What diffusers' config.json says: the class and its arguments as JSON."""

    vae: str = ""
    arguments: str = "{}"

    @classmethod
    def of(cls, vae: Any) -> DiffusersVaeConfig:
        """Returns the configuration of `vae`, without what depends on where it came from."""
        fields = {k: v for k, v in dict(vae.config).items() if not k.startswith("_")}
        return cls(type(vae).__name__, json.dumps(fields, sort_keys=True, default=list))


class DiffusersTokenizer(GridTokenizer):
    """Base of the wrapped autoencoders, whose latent is continuous; the model itself is `vae`."""

    config_class = DiffusersVaeConfig
    presets: ClassVar[dict[str, Any]] = {}

    def __init__(self, vae: Any, name: str | None = None) -> None:
        super().__init__(DiffusersVaeConfig.of(vae), name or type(vae).__name__)
        self._check(vae)
        self.vae = vae
        self.video_channels = self._video_channels(vae)
        self.train(vae.training)

    @staticmethod
    def _check(vae: Any) -> None:
        """Raises ValueError for a configuration that cannot be computed in units."""

    @staticmethod
    def _video_channels(vae: Any) -> int:
        return vae.config.in_channels

    @property
    def reference_version(self) -> str:
        """ "diffusers": the published behaviour is that of its class."""
        return "diffusers"

    @property
    def is_causal(self) -> bool:
        """Whether a latent depends on the frames of its own unit and of earlier ones only."""
        return True

    @property
    def latent_channels(self) -> int:
        """C of the latent."""
        return self.vae.config.latent_channels

    def encode_reference(self, video: Tensor) -> tuple[Tensor, int]:
        """Returns what `encode` of diffusers makes of a clip, and how many frames come back."""
        raw = self.vae.encode(video).latent_dist.parameters
        return raw, min(video.shape[2], self._decoded_frames(raw.shape[2]))

    def decode_reference(self, latent: Tensor, num_frames: int | None = None) -> Tensor:
        """Returns what `decode` of diffusers makes of a latent."""
        return self.vae.decode(latent).sample

    def _decoded_frames(self, num_latents: int) -> int:
        """Returns how many frames `decode` of diffusers makes of that many latents."""
        return 1 + (num_latents - 1) * self.temporal_factor

    def regularize(
        self,
        raw: Tensor,
        *,
        sample: bool = False,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        step: int = 0,
        compute_loss: bool = False,
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Returns latent, None and the KL loss of moments."""
        latent, losses = kl_posterior(raw, sample, generator)
        return latent, None, losses

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes the folder of diffusers, which `from_pretrained` there and here read.

        `latent_statistics`, which its config.json has no place for, are a file beside that.
        """
        self.vae.save_pretrained(folder)
        write_statistics_file(self.latent_statistics, folder)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike) -> VideoTokenizer:
        """Returns the wrapped model of a folder of diffusers, patched, in eval mode; see `load`."""
        return load(source, patch=True)

    @abstractmethod
    def _state_of(self, cache: Any) -> dict[str, Tensor]:
        """Returns the caches of diffusers as a flat dict of owned tensors."""


def _split(frames: Tensor, first: int, unit: int) -> list[Tensor]:
    """Returns `frames` [B, C, T, H, W] in a portion of `first` frames and others of `unit`."""
    head, rest = frames[:, :, :first], frames[:, :, first:]
    parts = [head, *rest.split(unit, dim=2)]
    return [part for part in parts if part.shape[2] > 0]


class WanTokenizer(DiffusersTokenizer):
    """AutoencoderKLWan: convolutions and attention within frames; streams exactly."""

    _FRAMES = 4  # that diffusers encodes at a time

    @staticmethod
    def _check(vae: Any) -> None:
        factor = 2 ** sum(map(bool, vae.config.temperal_downsample))
        if factor != WanTokenizer._FRAMES:
            raise ValueError(
                "wrap_diffusers: temperal_downsample must halve the frame rate twice, got "
                f"{vae.config.temperal_downsample}: diffusers encodes {WanTokenizer._FRAMES} "
                "frames at a time whatever it says"
            )

    @staticmethod
    def _video_channels(vae: Any) -> int:
        return vae.config.in_channels // (vae.config.patch_size or 1) ** 2

    @property
    def temporal_factor(self) -> int:
        """f: frames per latent frame."""
        return self._FRAMES

    @property
    def spatial_factor(self) -> int:
        """s: pixels per latent position along H and W."""
        return 2 ** (len(self.vae.config.dim_mult) - 1) * (self.vae.config.patch_size or 1)

    @property
    def latent_channels(self) -> int:
        """C of the latent."""
        return self.vae.config.z_dim

    def encode_chunk(self, video: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the moments of the next frames, or `(moments, state)`."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        cache = self._cache("encoder", state)
        if self.vae.config.patch_size is not None:
            video = patchify(video.contiguous(), patch_size=self.vae.config.patch_size)
        parts = [
            self.vae.encoder(frames, feat_cache=cache, feat_idx=[0])
            for frames in _split(video, 1 if state is None else 0, self._FRAMES)
        ]
        moments = self.vae.quant_conv(torch.cat(parts, dim=2))
        return (moments, self._state_of(cache)) if return_state else moments

    def decode_chunk(self, latent: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the frames of the next latents, or `(frames, state)`; clamped as in diffusers."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        cache = self._cache("decoder", state)
        parts = []
        for i, z in enumerate(self.vae.post_quant_conv(latent).split(1, dim=2)):
            is_first = state is None and i == 0
            options = {"feat_cache": cache, "feat_idx": [0], "first_chunk": is_first}
            parts.append(self.vae.decoder(z, **options))
        video = torch.cat(parts, dim=2)
        if self.vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=self.vae.config.patch_size)
        video = video.clamp(-1, 1)
        return (video, self._state_of(cache)) if return_state else video

    def _cache(self, network: str, state: State | None) -> list[Any]:
        """Returns the list of diffusers: None before, "Rep" for an entry without values."""
        cache: list[Any] = [None] * self.vae._cached_conv_counts[network]
        for index, frames in (state or {}).items():
            cache[int(index)] = frames if frames.numel() else "Rep"
        return cache

    def _state_of(self, cache: list[Any]) -> dict[str, Tensor]:
        weight = next(self.parameters())
        return {
            str(i): weight.new_empty([0] * 5) if isinstance(frames, str) else owned(frames)
            for i, frames in enumerate(cache)
            if frames is not None
        }


class CogVideoXTokenizer(DiffusersTokenizer):
    """AutoencoderKLCogVideoX: units of two latents that look at each other; streams exactly.

    A clip has 1 or 1 + 2 n latents: of another number diffusers decodes another number of frames.
    """

    @staticmethod
    def _check(vae: Any) -> None:
        factor = vae.config.temporal_compression_ratio
        frames, latents = vae.num_sample_frames_batch_size, vae.num_latent_frames_batch_size
        if frames != factor * latents:
            raise ValueError(
                f"wrap_diffusers: num_sample_frames_batch_size must be {factor} * "
                f"num_latent_frames_batch_size, got {frames} and {latents}: encoding and decoding "
                "would have different units"
            )

    @property
    def temporal_factor(self) -> int:
        """f: frames per latent frame."""
        return int(self.vae.config.temporal_compression_ratio)

    @property
    def spatial_factor(self) -> int:
        """s: pixels per latent position along H and W."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latents_per_unit(self) -> int:
        """Latents that the networks take at a time; the first unit has one more."""
        return self.vae.num_latent_frames_batch_size

    def _decoded_frames(self, num_latents: int) -> int:
        f, rest = self.temporal_factor, num_latents % self.latents_per_unit
        return f * num_latents if rest == 0 else 1 + f * (num_latents - 1)

    def encode_chunk(self, video: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the moments of the next units, or `(moments, state)`."""
        unit = self.vae.num_sample_frames_batch_size
        first = unit if state is not None else 1 if video.shape[2] == 1 else 1 + unit
        cache, parts = _nested(state), []
        for frames in _split(video, first, unit):
            moments, cache = self.vae.encoder(frames, conv_cache=cache)
            parts.append(moments if self.vae.quant_conv is None else self.vae.quant_conv(moments))
        moments = torch.cat(parts, dim=2)
        return (moments, self._state_of(cache)) if return_state else moments

    def decode_chunk(self, latent: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the frames of the next units, or `(frames, state)`; incomplete ones wait."""
        if state is not None and _WAITING in state:
            latent = torch.cat([state[_WAITING].to(latent.dtype), latent], dim=2)
        cache = _nested(state)
        count, unit = latent.shape[2], self.latents_per_unit
        first = unit if cache else unit + 1
        complete = 0 if count < first else first + (count - first) // unit * unit
        if not return_state and complete < count:
            if cache or count > 1:
                raise ValueError(
                    f"decode: latent must have 1 or 1 + {unit} n frames in all, got "
                    f"{count - complete} more: {type(self.vae).__name__} decodes {unit} at a time"
                )
            complete = first = count
        video = self._decoded(latent[:, :, :complete], first, cache)
        if not return_state:
            return video[0]
        following = self._state_of(video[1])
        if complete < count:
            following[_WAITING] = owned(latent[:, :, complete:])
        return video[0], following

    def _decoded(self, latent: Tensor, first: int, cache: Any) -> tuple[Tensor, Any]:
        """Returns the frames of whole units and the caches behind them."""
        batch, _, _, height, width = latent.shape
        s, channels = self.spatial_factor, self.vae.config.out_channels
        parts = [latent.new_empty(batch, channels, 0, s * height, s * width)]
        for z in _split(latent, first, self.latents_per_unit):
            z = z if self.vae.post_quant_conv is None else self.vae.post_quant_conv(z)
            frames, cache = self.vae.decoder(z, conv_cache=cache)
            parts.append(frames)
        return torch.cat(parts[1:] if len(parts) > 1 else parts, dim=2), cache

    def decode_rest(self, state: State) -> Tensor | None:
        """Returns the frames of a clip of one latent; ValueError for other unfilled units."""
        if _WAITING not in state:
            return None
        return self.decode_chunk(state[_WAITING][:, :, :0], state)

    def _state_of(self, cache: Any) -> dict[str, Tensor]:
        flat: dict[str, Tensor] = {}

        def collect(prefix: str, entries: Mapping[str, Any]) -> None:
            for name, entry in entries.items():
                if isinstance(entry, Mapping):
                    collect(f"{prefix}{name}.", entry)
                elif entry is not None and entry.shape[2] < _LONGEST_CACHE:
                    flat[prefix + name] = owned(entry)

        collect("", cache or {})
        return flat


# diffusers also hands back the whole input of kernels of one frame, which it never reads. A kernel
# of three frames needs two.
_LONGEST_CACHE = 3


def _nested(state: State | None) -> dict[str, Any] | None:
    """Returns the nested dicts that a flat state stands for, None before the first unit."""
    nested: dict[str, Any] = {}
    for path, frames in (state or {}).items():
        *parents, name = path.split(".")
        if path == _WAITING:
            continue
        entries = nested
        for parent in parents:
            entries = entries.setdefault(parent, {})
        entries[name] = frames
    return nested or None


class HunyuanVideoTokenizer(DiffusersTokenizer):
    """AutoencoderKLHunyuanVideo: group norm and attention over the clip; whole clips only."""

    @property
    def is_causal(self) -> bool:
        """False: statistics of group norm are those of all frames."""
        return False

    @property
    def starts_alone(self) -> bool:
        """The first latent stands for the first frame alone."""
        return True

    @property
    def temporal_factor(self) -> int:
        """f: frames per latent frame."""
        return self.vae.config.temporal_compression_ratio

    @property
    def spatial_factor(self) -> int:
        """s: pixels per latent position along H and W."""
        return self.vae.config.spatial_compression_ratio

    def _not_causal(self, op: str) -> ValueError:
        return ValueError(
            f"{op}: model must be causal for an exact stream, got {self.name}, whose group norm "
            "takes its statistics over all frames of a clip, as its attention does; encode and "
            "decode whole clips, or with frames='reference' the overlapping tiles of diffusers"
        )

    def encode_chunk(self, video: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the moments of a whole clip of 1 + k f frames."""
        if state is not None or return_state:
            raise self._not_causal("encode_chunk")
        return self.vae.quant_conv(self.vae.encoder(video))

    def decode_chunk(self, latent: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the 1 + (t - 1) f frames of a whole clip."""
        if state is not None or return_state:
            raise self._not_causal("decode_chunk")
        return self.vae.decoder(self.vae.post_quant_conv(latent))

    def _state_of(self, cache: Any) -> dict[str, Tensor]:
        raise self._not_causal("encode_chunk")


_TOKENIZERS: dict[str, type[DiffusersTokenizer]] = {
    "AutoencoderKLWan": WanTokenizer,
    "AutoencoderKLCogVideoX": CogVideoXTokenizer,
    "AutoencoderKLHunyuanVideo": HunyuanVideoTokenizer,
}


def wrap(vae: nn.Module, name: str | None = None) -> VideoTokenizer:
    """Returns a VideoTokenizer on the parameters of `vae`; see `vt.wrap_diffusers`."""
    class_name = vae_class_name("wrap_diffusers", vae)
    if class_name in _TOKENIZERS:
        return _TOKENIZERS[class_name](vae, name)
    model = from_diffusers(vae, share=True)
    model.name = name or model.name
    return model


def load(folder: str | os.PathLike, patch: bool) -> VideoTokenizer:
    """Returns the wrapped model of a folder of diffusers; see `load_diffusers_vae`."""
    op = "load_diffusers_vae"
    class_name = vae_class_of(folder)
    if class_name is None:
        raise ValueError(
            f"{op}: folder must hold one of {', '.join(VAE_CLASSES)} as diffusers saves it, got "
            f"{os.fspath(folder)!r}"
        )
    kind = getattr(require(op, "diffusers"), class_name)
    vae = kind.from_pretrained(os.fspath(folder), use_safetensors=True, local_files_only=True)
    model = wrap((patch_layers(vae, False) if patch else vae).eval())
    model.latent_statistics = read_statistics_file(folder, op)
    return model
