"""Growing a causal tokenizer: twice the temporal compression on top of a frozen one.

    f_sub  = E(x[:, :, ::2]),  f_full = E(x)            features of the frozen encoder
    s      = 1 + W f_sub + b                            per channel, W and b start at 0
    z      = conv_out(h + f_sub),  h = Down(Block(f_full * s))
    video  = D(Up(Block(conv_in(z))))                   the frozen decoder behind its conv_in

Features are those before the latent convolutions, which start as copies of the base's. At the start
h is 0, Block is the identity and Up repeats frames: z is the base's latent of every second frame,
decoded with each frame of features given twice. Source: ProMAG (arXiv 2501.05442), its method
figure; "AdaNorm" there only multiplies. Ours: the start, mixing per position, and that the norms of
the new blocks are of the base's kind.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtok_ext.layers import CausalConv3d, norm_act
from vtok_ext.layers._state import State, StateFlow
from vtok_ext.layers.volume import (
    NormFactory,
    RepeatFrames,
    VolumeBlock,
    VolumeDown,
    VolumeUp,
    start_as_identity,
)
from vtok_ext.models._config import ModelConfig
from vtok_ext.models._fingerprint import weights_fingerprint
from vtok_ext.models._trunk import trunk
from vtok_ext.models.base import VideoTokenizer
from vtok_ext.models.grid import GridTokenizer
from vtok_ext.models.promag import ProMAG, promag_norm
from vtok_ext.models.promag_config import ProMAGConfig
from vtok_ext.models.vidtok import VidTok

MIXINGS = ("per_position", "global")


@dataclass(frozen=True)
class GrownConfig(ModelConfig):
    """Configuration of a grown tokenizer, which includes that of its base.

    Attributes:
        base_model: class of the base: one of `GROWABLE`.
        base_config: configuration of the base; of a grown base with its own base in it.
        base_id: the base's `model_id`.
        base_sha256: `weights_sha256` of the base's encoder and decoder, the lineage.
        mixing: "per_position" (full-rate feature i is scaled by sub-rate feature ceil(i / 2)), or
            "global", one scale for a whole clip, which is not causal.
        use_subsampled: False leaves f_sub out, for studies: h must then carry everything, so its
            convolution starts as picking the frames that f_sub has.
        decoder_unlocked: whether stage III may change the base's decoder.
    """

    base_model: str
    base_config: ModelConfig
    base_id: str
    base_sha256: tuple[str, ...]
    mixing: str = "per_position"
    use_subsampled: bool = True
    decoder_unlocked: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        self._require_choice("base_model", tuple(GROWABLE))
        expected = GROWABLE[self.base_model].config_class
        if not isinstance(self.base_config, expected):
            raise self._error("base_config", f"a {expected.__name__}")
        if not isinstance(self.base_id, str):
            raise self._error("base_id", "text")
        digests = self.base_sha256
        if not isinstance(digests, tuple) or [type(d) for d in digests] != [str, str]:
            raise self._error("base_sha256", "two SHA-256 digests")
        self._require_choice("mixing", MIXINGS)
        self._require_choice("use_subsampled", (True, False))
        self._require_choice("decoder_unlocked", (True, False))

    @classmethod
    def _checked(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        fields = super()._checked(fields)
        inner = fields.get("base_config")
        if isinstance(inner, Mapping):
            model_class = GROWABLE.get(str(fields.get("base_model")))
            if model_class is not None:  # else the constructor says what is wrong
                fields["base_config"] = model_class.config_class.from_dict(inner)
        return fields

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as values that JSON can hold."""
        return {**super().to_dict(), "base_config": self.base_config.to_dict()}

    @property
    def is_discrete(self) -> bool:
        """Whether the latent is quantised, as the base's is."""
        return self.base_config.is_discrete

    @property
    def regularizer(self) -> str:
        """Kind of latent, for tables."""
        return getattr(self.base_config, "regularizer", "kl")

    @property
    def origin(self) -> ModelConfig:
        """Configuration of the tokenizer that was grown first."""
        inner = self.base_config
        return inner.origin if isinstance(inner, GrownConfig) else inner


def _norm_like(config: ModelConfig) -> NormFactory:
    """Returns what makes normalisations like those of the tokenizer that was grown first."""
    if isinstance(config, ProMAGConfig):
        return promag_norm(config)
    norm_type = getattr(config, "norm_type", "layernorm")
    return lambda channels: norm_act(channels, norm_type)


class GrownEncoder(nn.Module):
    """Returns the raw latent of two feature clips, and with `return_state=True` the state.

    Args:
        channels: C of the features.
        conv_out: the base's last convolution, which is copied.
        norm: makes the block's normalisations.
        mixing, use_subsampled: as in GrownConfig.
    """

    def __init__(
        self,
        channels: int,
        conv_out: nn.Module,
        norm: NormFactory,
        mixing: str,
        use_subsampled: bool,
    ) -> None:
        super().__init__()
        self.mixing, self.use_subsampled = mixing, use_subsampled
        if use_subsampled:
            self.repeat = RepeatFrames(2)
            self.affine = CausalConv3d(channels, channels, 1)
            with torch.no_grad():
                for parameter in self.affine.parameters():  # 1 in the bias, 0 in the matrix
                    parameter.fill_(float(parameter.dim() == 1))
        self.block = VolumeBlock(channels, channels, norm)
        self.down = VolumeDown(channels, time=2, space=1)
        for parameter in self.block.conv2.parameters():
            nn.init.zeros_(parameter)
        for parameter in self.down.parameters():
            nn.init.zeros_(parameter)
        if not use_subsampled:
            start_as_identity(self.down)
        self.conv_out = copy.deepcopy(conv_out)

    def forward(
        self,
        full: Tensor,  # [B, C, T, H, W]
        sub: Tensor | None,  # [B, C, ceil(T / 2), H, W]
        state: State | None = None,
        return_state: bool = False,
    ):
        """Returns the raw latent [B, zc, ceil(T / 2), H, W], or `(latent, state)`."""
        flow = StateFlow(state, return_state)
        if sub is not None:
            full = full * self._scale(sub, state is None)
        h = flow("down", self.down, flow("block", self.block, full))
        return flow.result(flow("conv_out", self.conv_out, h if sub is None else h + sub))

    def _scale(self, sub: Tensor, starts: bool) -> Tensor:
        if self.mixing == "global":
            return self.affine(sub.mean((2, 3, 4), keepdim=True))
        return self.repeat(self.affine(sub), starts)


class GrownDecoder(nn.Module):
    """Returns features at twice the rate of a latent [B, z, t, H, W]; streams like `VolumeUp`."""

    def __init__(self, channels: int, conv_in: nn.Module, norm: NormFactory) -> None:
        super().__init__()
        self.conv_in = copy.deepcopy(conv_in)
        self.block = VolumeBlock(channels, channels, norm)
        for parameter in self.block.conv2.parameters():
            nn.init.zeros_(parameter)
        self.up = VolumeUp(channels, time=2, space=1)
        self.up.start_as_repetition()

    def forward(self, x: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the features [B, C, 2 t - 1, H, W], or `(features, state)`."""
        flow = StateFlow(state, return_state)
        x = flow("conv_in", self.conv_in, x.contiguous(memory_format=torch.channels_last_3d))
        return flow.result(flow("up", self.up, flow("block", self.block, x)))


class Grown(GridTokenizer):
    """Returns a tokenizer of twice the temporal factor of its frozen base; see `grow`.

    Attributes:
        base: the tokenizer it was grown from, whole and frozen; always in eval mode.
    """

    config: GrownConfig
    config_class = GrownConfig
    presets: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: GrownConfig, name: str | None = None, base: Any = None) -> None:
        super().__init__(config, name)
        if base is None:
            base = GROWABLE[config.base_model](config.base_config, config.base_id.split("@")[0])
        self.base = base
        self.video_channels = base.video_channels
        channels, norm = _feature_channels(base), _norm_like(config.origin)
        mixing, sub = config.mixing, config.use_subsampled
        self.encoder = GrownEncoder(channels, base.encoder.conv_out, norm, mixing, sub)
        self.decoder = GrownDecoder(channels, base.decoder.conv_in, norm)
        # Copies of a base's convolutions may be frozen, as those of a base that was grown are not.
        for part in (self.encoder, self.decoder):
            part.requires_grad_(True)
        self.base.requires_grad_(False)
        if config.decoder_unlocked:
            self.unlock_decoder()
        self.train(self.training)

    @property
    def is_causal(self) -> bool:
        """Whether a latent depends on its own and earlier frames only."""
        looks_back = self.config.mixing == "per_position" or not self.config.use_subsampled
        return looks_back and self.base.is_causal

    @property
    def starts_alone(self) -> bool:
        """Whether the first latent stands for the first frame alone: always."""
        return True

    @property
    def temporal_factor(self) -> int:
        """f: frames per latent frame, twice the base's."""
        return 2 * self.base.temporal_factor

    @property
    def spatial_factor(self) -> int:
        """s: pixels per latent position along H and W, the base's."""
        return self.base.spatial_factor

    @property
    def latent_channels(self) -> int:
        """Channels of the latent, the base's."""
        return self.base.latent_channels

    @property
    def codebook_size(self) -> int | None:
        """Number of codes of a discrete base, else None."""
        return self.base.codebook_size

    @property
    def quantizer(self) -> nn.Module | None:
        """The base's quantizer, frozen with it."""
        return self.base.quantizer

    @property
    def reference_version(self) -> str:
        """The base's version of the published behaviour."""
        return self.base.reference_version

    def train(self, mode: bool = True):
        """Returns self; the base stays in eval mode."""
        super().train(mode)
        self.base.eval()
        return self

    def trainable(self) -> dict[str, nn.Parameter]:
        """Returns the parameters that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def unlock_decoder(self) -> None:
        """Returns None with all decoders trained and the encoder frozen: stage III.

        Ours: latents keep their meaning, so that what was made of them stays valid.
        """
        self.config = dataclasses.replace(self.config, decoder_unlocked=True)
        self.encoder.requires_grad_(False)
        self.decoder.requires_grad_(True)
        model: Any = self
        while isinstance(model, Grown):
            model = model.base
            model.decoder.requires_grad_(True)
            model.decoder.conv_in.requires_grad_(False)  # nothing passes through it any more

    def check_base(self) -> None:
        """Raises ValueError unless the base's weights are those of the recorded lineage.

        A decoder unlocked by stage III is exempt. A model that was saved in half precision is
        compared by its fingerprint, which does not see that rounding.
        """
        expected: tuple[str, ...] = self.config.base_sha256
        found: tuple[str, ...] = weights_sha256(self.base)
        if self.config.decoder_unlocked:
            expected, found = expected[:1], found[:1]
        if found == expected:
            return
        weights = self.base.state_dict()
        halved = all(torch.equal(w, w.bfloat16().to(w.dtype)) for w in weights.values())
        if halved and self.config.base_id.endswith("+" + weights_fingerprint(weights)):
            return
        raise ValueError(
            f"{self.name}: base must have the weights of {self.config.base_id} that it was grown "
            "on, got others"
        )

    @classmethod
    def from_pretrained(cls, source) -> VideoTokenizer:
        """Returns the saved model in eval mode, its base verified. Raises as the base class's."""
        model: Any = super().from_pretrained(source)
        model.check_base()
        return model

    def encode_chunk(self, video: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the raw latent of the next frames of a stream, or `(latent, state)`."""
        if (state is not None or return_state) and not self.is_causal:
            raise self._not_causal("encode_chunk")
        flow = StateFlow(state, return_state)
        sub = None
        # Frozen: no graph through it, unless somebody asks for the gradient of the video.
        with torch.set_grad_enabled(torch.is_grad_enabled() and video.requires_grad):
            encode = trunk(self.base).encode_chunk
            full = flow("full", encode, video)
            if self.config.use_subsampled:
                # Frame 0 is of the first group; every other chunk begins with an odd frame.
                sub = flow("sub", encode, video[:, :, 0 if state is None else 1 :: 2])

        def mix(full: Tensor, *state, **options):
            return self.encoder(full, sub, *state, **options)

        return flow.result(flow("encoder", mix, full))

    def decode_chunk(self, latent: Tensor, state: State | None = None, return_state: bool = False):
        """Returns the frames of the next latents of a stream, or `(frames, state)`."""
        flow = StateFlow(state, return_state)
        features = flow("decoder", self.decoder, latent)
        return flow.result(flow("base", trunk(self.base).decode_chunk, features))

    def decode_rest(self, state: State) -> Tensor | None:
        """Returns the frames that wait in the base's state at the end of a stream, or None."""
        prefix = "base."
        inner = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        return trunk(self.base).decode_rest(inner)

    def encode_reference(self, video: Tensor) -> tuple[Tensor, int]:
        """Returns the raw latent and the frame count of a clip of 1 + k f frames."""
        if (video.shape[2] - 1) % self.temporal_factor:
            raise ValueError(
                f"encode: video must have 1 + k * {self.temporal_factor} frames with "
                f"frames='reference', got {list(video.shape)}"
            )
        return self.encode_chunk(video), video.shape[2]

    def decode_reference(self, latent: Tensor, num_frames: int | None = None) -> Tensor:
        """Returns the frames of a latent, the `num_frames` of it."""
        return self.decode_chunk(latent)

    def regularize(self, raw: Tensor, **options):
        """Returns latent, indices and losses of a raw latent, as the base does."""
        return self.base.regularize(raw, **options)

    def indices_to_latent(self, indices: Tensor) -> Tensor:
        """Returns codes [B, C, t, h, w] of ids [B, t, h, w]."""
        return self.base.indices_to_latent(indices)

    def tiled(self, tile: Any = "auto", *, mode: str = "exact", **options: Any) -> Any:
        """Returns a view in tiles; an exact one is tiled inside each layer, see `promag_tiling`.

        Args:
            tile: (height, width) in pixels, rounded up to multiples of the spatial factor.
            mode, **options: as `GridTokenizer.tiled`.

        Raises:
            ValueError: an option is not as described, or a base with other
                layers than ProMAG's.
        """
        if mode != "exact":
            return super().tiled(tile, mode=mode, **options)
        from vtok_ext.models.promag_tiling import exact_view  # it builds on this file

        return exact_view(self, tile)


GROWABLE: dict[str, Any] = {"ProMAG": ProMAG, "VidTok": VidTok, "Grown": Grown}


def _feature_channels(base: Any) -> int:
    """Returns C of the features of a tokenizer."""
    return base.encoder.conv_out.conv.in_channels


def weights_sha256(model: Any) -> tuple[str, str]:
    """Returns the SHA-256 of all bytes of the weights: of the decoder apart, which may be unlocked.

    Returns:
        (all but decoders, decoders), hexadecimal.
    """
    digests = (hashlib.sha256(), hashlib.sha256())
    for name, value in sorted(model.state_dict().items()):
        digest = digests["decoder" in name.split(".")]
        digest.update(f"{name}{list(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digests[0].hexdigest(), digests[1].hexdigest()


def grow(model: VideoTokenizer, factor: int = 2, mixing: str = "per_position") -> Grown:
    """Returns a tokenizer of twice the temporal compression, whose new parts are to be trained.

    Before training it encodes every second frame as `model` does. The model is copied, the copy
    frozen; the rest of a training is `vtok grow` or your own loop over `trainable()`.

    Args:
        model: a causal tokenizer: ProMAG, VidTok, or one that has been grown, to grow further.
        factor: 2; higher factors are grown step by step, each trained before the next.
        mixing: "per_position", causal and exact in streams; or "global", one scale per clip.

    Raises:
        TypeError: not a tokenizer of this package.
        ValueError: another factor or mixing, or a model that is not causal or has no latent grid.

    Source: ProMAG (arXiv 2501.05442).
    """
    if not isinstance(model, VideoTokenizer):
        raise TypeError(f"grow: model must be a VideoTokenizer, got {type(model).__name__}")
    # One grown with global mixing is not causal, but divides frames into groups as causal ones do.
    if type(model).__name__ not in GROWABLE or not getattr(model, "starts_alone", False):
        raise ValueError(
            f"grow: model must be a causal one of {', '.join(GROWABLE)}, got {model.name}"
        )
    if factor != 2:
        raise ValueError(
            f"grow: factor must be 2, each step being trained before the next, got {factor!r}"
        )
    base: Any = copy.deepcopy(model)
    config = GrownConfig(
        base_model=type(model).__name__,
        base_config=model.config,
        base_id=model.model_id,
        base_sha256=weights_sha256(model),
        mixing=mixing,
    )
    weight = next(model.parameters())
    name = f"{model.name.split('_grown_')[0]}_grown_{2 * base.temporal_factor}x"
    return Grown(config, name, base).to(device=weight.device, dtype=weight.dtype)
