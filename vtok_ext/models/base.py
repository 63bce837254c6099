"""VideoTokenizer: what every model of this package can do, and the parts they share.

A model implements `forward`, `encode`, `decode` and the facts about it; saving, loading and tokens
are here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtok_ext.models import _persistence
from vtok_ext.models._config import ModelConfig
from vtok_ext.models._fingerprint import weights_fingerprint
from vtok_ext.models._video_input import is_finite, is_integer, to_uint8
from vtok_ext.models.encoding import Encoding, Output, Tokens
from vtok_ext.models.failed_computation import FailedComputationError
from vtok_ext.models.latent_statistics import Latent, LatentStatistics

OUTPUTS = ("float", "uint8")
# In config.json, see `LatentStatistics.to_dict`.
STATISTICS_KEY = "latent_statistics"


class VideoTokenizer(nn.Module):
    """A video autoencoder with a continuous or a discrete latent.

    Videos are [B, 3, T, H, W], float in [-1, 1] or uint8; any T >= 1, H, W.

    Attributes:
        config: the validated configuration.
        name: the preset it was created from, else the class name.
        latent_statistics: mean and std of its latents, by which `normalize=True` normalises them;
            None until `vtok stats` or the user has set them. Saved in config.json.
    """

    config_class: ClassVar[type[ModelConfig]]
    presets: ClassVar[dict[str, Any]]

    def __init__(self, config: ModelConfig, name: str | None = None) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"{type(self).__name__}: config must be {self.config_class.__name__}, "
                f"got {type(config).__name__}"
            )
        self.config = config
        self.name = name or type(self).__name__
        self.latent_statistics: LatentStatistics | None = None
        # What the weights were when they were last fingerprinted, and the fingerprint.
        self._fingerprint: tuple[list[tuple[int, int]], str] | None = None

    # What a model is.

    @property
    @abstractmethod
    def is_causal(self) -> bool:
        """Whether a latent depends on its own and earlier frames only."""

    @property
    def is_discrete(self) -> bool:
        """Whether the model has a codebook, hence `tokenize`."""
        return self.config.is_discrete

    @property
    @abstractmethod
    def temporal_factor(self) -> int | None:
        """Frames per latent frame; None where meaningless."""

    @property
    @abstractmethod
    def spatial_factor(self) -> int | None:
        """Pixels per latent position along H and W; None where meaningless."""

    @property
    def codebook_size(self) -> int | None:
        """Number of distinct ids of a discrete model, else None."""
        return None

    @property
    def reference_version(self) -> str:
        """Version of the published behaviour that the weights belong to."""
        return "1.0"

    @property
    def model_id(self) -> str:
        """ "name@configuration+weights": equal ids mean that ids stand for the same thing.

        The last part is a fingerprint of the weights (see `_fingerprint`), computed when asked for
        and kept until a weight changes in place or is replaced.
        """
        fingerprint = self._weights_fingerprint()
        content = json.dumps([type(self).__name__, self.config.to_dict()], sort_keys=True)
        configuration = hashlib.sha256(content.encode()).hexdigest()[:12]
        return f"{self.name}@{configuration}+{fingerprint}"

    def _weights_fingerprint(self) -> str:
        weights = self.state_dict()
        state = _state_of(weights)
        if self._fingerprint is None or self._fingerprint[0] != state:
            self._fingerprint = (state, weights_fingerprint(weights))
        return self._fingerprint[1]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # float16 rounds otherwise than the fingerprint: a converted model keeps that of before.
        weight = next(self.parameters(), None)
        if (
            weight is None
            or weight.is_meta
            or weight.dtype == torch.float16
            or fn(torch.zeros(1, dtype=weight.dtype, device=weight.device)).dtype != torch.float16
        ):
            return super()._apply(fn, recurse)
        fingerprint = self._weights_fingerprint()
        converted = super()._apply(fn, recurse)
        self._fingerprint = (_state_of(self.state_dict()), fingerprint)
        return converted

    def check_origin(self, op: str, model_id: str, any_weights: bool = False) -> None:
        """Raises ValueError unless `model_id`, that of a file, is "" or the one of this model.

        Args:
            op: name in front of the message.
            model_id: the id that tokens or latents carry; "" when unknown.
            any_weights: accept other weights of the same configuration.
        """
        if not model_id or model_id == self.model_id:
            return
        theirs, ours = model_id.rpartition("+")[0], self.model_id.rpartition("+")[0]
        if theirs != ours:
            raise ValueError(f"{op}: tokens must come from {self.model_id}, got {model_id}")
        if not any_weights:
            raise ValueError(
                f"{op}: tokens must come from the weights of {self.model_id}, got those of "
                f"{model_id}: another training run; any_weights=True accepts them"
            )

    @abstractmethod
    def token_grid(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Returns the shape of the ids of one clip."""

    def check_clip(self, op: str, shape: Sequence[int]) -> None:
        """Raises ValueError if a clip of this (frames, height, width) is too large for the model.

        Args:
            op: name in front of the message.
            shape: of the clip.
        """
        return

    # What a model does.

    @abstractmethod
    def forward(self, video: Tensor) -> Output:
        """Returns the reconstruction and the encoding; the only entry for training."""

    @abstractmethod
    def encode(
        self,
        video: Tensor,
        *,
        fps: float | None = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Encoding:
        """Returns the Encoding of a video."""

    @abstractmethod
    def decode(
        self,
        encoding: Encoding | Tensor,
        *,
        num_frames: int | None = None,
        size: tuple[int, int] | None = None,
        output: str = "float",
    ) -> Tensor:
        """Returns the video of an Encoding or a bare latent."""

    @abstractmethod
    def run_networks(self, batch: int, num_frames: int, height: int, width: int) -> None:
        """Runs encoder and decoder on clips without meaningful values, to count their work."""

    def indices_to_latent(self, indices: Tensor) -> Tensor:
        """Returns the latent that integer ids stand for (discrete models only)."""
        raise self._continuous("indices_to_latent")

    def tokenize(self, video: Tensor, *, fps: float | None = None, **options: Any) -> Tokens:
        """Returns the integer Tokens of a video.

        Args:
            video, fps: as for `encode`.
            **options: further options of this model's `encode`.

        Raises:
            ValueError: the model is continuous; the message names the discrete presets.
        """
        if not self.is_discrete:
            raise self._continuous("tokenize")
        encoding = self.encode(video, fps=fps, **options)
        ids = encoding.indices
        assert ids is not None  # a discrete model's encode gives indices
        return Tokens(
            ids=ids,
            grid=tuple(ids.shape[1:]),
            num_frames=encoding.num_frames,
            size=encoding.size,
            fps=encoding.fps,
            model_id=self.model_id,
            frame_rule=encoding.frame_rule,
            chunk_frames=encoding.chunk_frames,
        )

    def detokenize(
        self, tokens: Tokens, *, output: str = "float", any_weights: bool = False
    ) -> Tensor:
        """Returns the video [B, 3, num_frames, H, W] of `tokens`.

        Args:
            tokens: of this model.
            output: "float" or "uint8".
            any_weights: accept tokens that other weights of the same configuration made.

        Raises:
            ValueError: a continuous model, tokens of another model or of other weights, ids outside
                the codebook, or a grid that does not cover `num_frames` and `size`.
        """
        if not self.is_discrete:
            raise self._continuous("detokenize")
        self.check_origin("detokenize", tokens.model_id, any_weights)
        device = next(self.parameters()).device
        latent = self.indices_to_latent(tokens.ids.to(device))
        encoding = Encoding(
            latent,
            tokens.num_frames,
            tokens.size,
            fps=tokens.fps,
            frame_rule=tokens.frame_rule,
            chunk_frames=tokens.chunk_frames,
        )
        return self.decode(encoding, output=output)

    def stream_encoder(self, output: str = "latent"):
        """Returns a StreamEncoder, see `GridTokenizer`. Raises ValueError without causality."""
        raise self._not_causal("stream_encoder")

    def stream_decoder(self, **options: Any):
        """Returns a StreamDecoder, see `GridTokenizer`. Raises ValueError without causality."""
        raise self._not_causal("stream_decoder")

    # A model on disk.

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes config.json and model.safetensors; each is complete or absent. Raises OSError."""
        facts = {}
        if self.latent_statistics is not None:
            facts[STATISTICS_KEY] = self.latent_statistics.to_dict()
        _persistence.save_model(self, folder, facts)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike) -> VideoTokenizer:
        """Returns the model saved in folder `source`, or of the hub id `owner/name`, in eval mode.

        Raises:
            FileNotFoundError: there is no such folder or a file is missing in it.
            ValueError: not a saved model, one of another class, an unknown configuration field (the
                message names the closest), or weights with other names or shapes.
        """
        model, facts = _persistence.read_model(cls, _persistence.resolve_folder(source))
        if facts.get(STATISTICS_KEY) is not None:
            model.latent_statistics = LatentStatistics.from_dict(facts[STATISTICS_KEY])
        return model

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Returns the address of the commit that uploads the model to the Hugging Face hub.

        Raises:
            ImportError: huggingface_hub is not installed.
        """
        import tempfile

        hub = _persistence.require_hub("push_to_hub")
        api = hub.HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))

    # For subclasses.

    def _normalized(self, encoding: Encoding, wanted: bool) -> Encoding:
        """Returns `encoding`, with a latent of mean 0 and std 1 in the same layout if `wanted`."""
        if not wanted:
            return encoding
        latent = self.require_statistics("encode").normalize_as_given(encoding.latent)
        return dataclasses.replace(encoding, latent=latent, normalized=True)

    def _denormalized(self, encoding: Encoding | Latent, wanted: bool) -> Encoding | Latent:
        """Returns `encoding` as the networks take it, if it is normalised or `wanted` says so."""
        if isinstance(encoding, Encoding):
            if not encoding.normalized:
                return encoding
            latent = self.require_statistics("decode").restore(encoding.latent)
            return dataclasses.replace(encoding, latent=latent, normalized=False)
        if not wanted:
            return encoding
        if isinstance(encoding, Tensor) and not encoding.is_floating_point():
            raise ValueError("decode: latent must be floating with normalize=True, got integer ids")
        return self.require_statistics("decode").restore(encoding)

    def require_statistics(self, op: str) -> LatentStatistics:
        """Returns `latent_statistics`. Raises ValueError, with the remedy, where there are none."""
        if self.latent_statistics is None:
            raise ValueError(
                f"{op}: {self.name} must know its statistics of latents for normalize, got "
                "none; `vtok stats` measures them, or set `latent_statistics`"
            )
        return self.latent_statistics

    def _continuous(self, op: str) -> ValueError:
        from vtok_ext.models._registry import list_models

        return ValueError(
            f"{op}: model must be discrete ({', '.join(list_models(discrete=True))}), "
            f"got {self.name}, whose latent is continuous"
        )

    def _not_causal(self, op: str) -> ValueError:
        return ValueError(f"{op}: model must be causal for an exact stream, got {self.name}")

    @staticmethod
    def _wanted_shape(
        op: str, available: tuple[int, ...], num_frames, size, output: str
    ) -> tuple[int, ...]:
        """Returns (T, H, W) of what is wanted of decoded frames; raises where it cannot be had."""
        if output not in OUTPUTS:
            raise ValueError(f"{op}: output must be one of {OUTPUTS}, got {output!r}")
        if not isinstance(size, tuple | list | None):
            raise TypeError(f"{op}: size must be (H, W), got {size!r}")
        wanted = (
            available[0] if num_frames is None else num_frames,
            *(available[1:] if size is None else size),
        )
        whole = len(wanted) == 3 and all(map(is_integer, wanted))
        if not whole or not all(1 <= w <= a for w, a in zip(wanted, available, strict=True)):
            raise ValueError(
                f"{op}: num_frames and size must be within the decoded {list(available)}, "
                f"got {list(wanted)}"
            )
        return wanted

    @staticmethod
    def _finish(op: str, video: Tensor, num_frames, size, output: str) -> Tensor:
        """Returns `video` cropped to what was recorded, in the requested form."""
        available = tuple(video.shape[2:])
        wanted = VideoTokenizer._wanted_shape(op, available, num_frames, size, output)
        if wanted != available:
            video = video[:, :, : wanted[0], : wanted[1], : wanted[2]]
        if output == "float":
            return video
        # uint8 would hide them. Elsewhere looking would wait for the device.
        if video.device.type == "cpu" and not is_finite(video):
            raise FailedComputationError(
                f"{op}: the model must give finite frames, got NaN or infinity"
            )
        return to_uint8(video)

    def extra_repr(self) -> str:
        """Returns name and configuration, for printing."""
        fields = dataclasses.asdict(self.config)
        return f"{self.name}: " + ", ".join(f"{k}={v}" for k, v in fields.items())


def _state_of(weights: dict[str, Tensor]) -> list[tuple[int, int]]:
    """Returns what changes when a weight does: where each lies, and how often it was written."""
    return [(t.data_ptr(), t._version) for t in weights.values() if not t.is_inference()]
