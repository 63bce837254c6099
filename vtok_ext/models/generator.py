"""LatentGenerator: what SiT and GPT share. They make latents; a tokenizer turns those into videos.

A generator is no VideoTokenizer: it neither encodes nor decodes. It knows which tokenizer its
latents belong to and what kind of clip they stand for, and carries both, with the statistics of
the latents, in its config.json.
"""

from __future__ import annotations

import dataclasses
import math
import os
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtok_ext.layers.kl import Generators
from vtok_ext.models import _persistence
from vtok_ext.models._config import ModelConfig
from vtok_ext.models._random import uniform
from vtok_ext.models.base import VideoTokenizer
from vtok_ext.models.encoding import Encoding
from vtok_ext.models.latent_statistics import Latent, LatentStatistics


@dataclasses.dataclass(frozen=True)
class LatentOrigin:
    """What the latents of a generator stand for.

    Attributes:
        num_frames, height, width, fps: of the clips.
        tokenizer_id: `VideoTokenizer.model_id` of the tokenizer, "" when unknown.
        tokenizer: folder or file that it was loaded from, None when unknown.
    """

    num_frames: int
    height: int
    width: int
    fps: float | None = None
    tokenizer_id: str = ""
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        """Checks every field: the values may come from a file."""
        sizes = (self.num_frames, self.height, self.width)
        if not all(type(size) is int and size >= 1 for size in sizes):
            raise ValueError(f"LatentOrigin: sizes must be integers >= 1, got {sizes}")
        ok = isinstance(self.fps, int | float) and 0 < self.fps < math.inf
        if self.fps is not None and (isinstance(self.fps, bool) or not ok):
            raise ValueError(
                f"LatentOrigin: fps must be None, or finite and positive, got {self.fps!r}"
            )
        texts = (self.tokenizer_id, self.tokenizer or "")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"LatentOrigin: names must be text, got {texts}")


class LatentGenerator(nn.Module):
    """A model that samples latents.

    Attributes:
        config: the validated configuration, with `num_classes` and `has_none`.
        name: the preset it was created from, else the class name.
        origin: what its latents stand for, None until it is known.
        statistics: by which they are normalised, None for tokens or until they are known.
    """

    config_class: ClassVar[type[ModelConfig]]
    presets: ClassVar[dict[str, Any]]
    reference_version: ClassVar[str] = "1.0"

    def __init__(self, config: ModelConfig, name: str | None = None) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"{type(self).__name__}: config must be {self.config_class.__name__}, "
                f"got {type(config).__name__}"
            )
        self.config: Any = config
        self.name = name or type(self).__name__
        self.origin: LatentOrigin | None = None
        self.statistics: LatentStatistics | None = None

    @abstractmethod
    def loss(
        self,
        latent: Latent,
        labels: Tensor | None = None,
        generator: Generators = None,
        call: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Returns the training loss [B] of latents, or ids, of the tokenizer."""

    @abstractmethod
    def sample(self, num_samples: int = 1, **options: Any) -> Latent:
        """Returns latents, or ids, in the layout of the tokenizer."""

    def require_statistics(self, op: str) -> LatentStatistics:
        """Returns the statistics. Raises ValueError when there are none."""
        if self.statistics is None:
            raise ValueError(
                f"{op}: {self.name} must know the statistics of its latents, got none; set "
                "`statistics`, for example from `read_statistics`"
            )
        return self.statistics

    def set_statistics(self, statistics: LatentStatistics, op: str) -> None:
        """Returns None after taking over statistics. Raises ValueError for those of others."""
        self.statistics = statistics
        self.require_statistics(op)

    def check_labels(self, op: str, labels: Any, count: int, num_labels: int) -> None:
        """Raises ValueError unless labels are a tensor of `count` integers in 0 .. num_labels - 1.

        Values of a GPU are looked at for `sample` only: elsewhere that would wait for it.
        """
        ok = isinstance(labels, Tensor) and labels.dtype in (torch.int32, torch.int64)
        ok = ok and labels.shape == (count,)
        is_read = op == "sample" or (type(labels) is Tensor and labels.device.type == "cpu")
        if ok and is_read and not torch.compiler.is_compiling():
            ok = all(0 <= label < num_labels for label in labels.tolist())
        if not ok:
            found = labels.tolist() if isinstance(labels, Tensor) else labels
            raise ValueError(
                f"{op}: labels must be {count} integers in 0..{num_labels - 1}, got {found!r}"
            )

    def checked_labels(self, op: str, labels: Tensor | None, num_samples: int) -> Tensor:
        """Returns labels [num_samples] of classes on the model's device, 0 by default.

        Raises:
            ValueError: no samples, or labels as `check_labels` has them; "none" is no class.
        """
        device = next(self.parameters()).device
        if num_samples < 1:
            raise ValueError(f"{op}: num_samples must be >= 1, got {num_samples}")
        if labels is None:
            return torch.zeros(num_samples, dtype=torch.long, device=device)
        self.check_labels(op, labels, num_samples, self.config.num_classes)
        return labels.long().to(device)

    def training_labels(
        self, labels: Tensor | None, batch: int, generator: Generators = None
    ) -> Tensor:
        """Returns labels [batch] to train with: in training mode some are "none", if there is one.

        Args:
            labels: [batch] integers; default 0.
            batch: B.
            generator: source of the choice, or one per sample.

        Raises:
            ValueError: as `checked_labels`.
        """
        labels = self.checked_labels("loss", labels, batch)
        if not (self.training and self.config.has_none):
            return labels
        dropped = uniform(batch, generator).to(labels.device) < self.config.class_dropout
        return torch.where(dropped, self.config.num_classes, labels)

    def decode(
        self,
        tokenizer: VideoTokenizer,
        latent: Latent,
        *,
        output: str = "uint8",
        any_weights: bool = False,
    ) -> Tensor:
        """Returns the videos [B, 3, T, H, W] of sampled latents or ids.

        Args:
            tokenizer: the one that the generator was trained on.
            latent: what `sample` returned.
            output: "uint8", or "float" in about [-1, 1].
            any_weights: accept other weights of the same tokenizer.

        Raises:
            ValueError: another tokenizer, or the generator does not know what its latents stand
                for.
        """
        if self.origin is None:
            raise ValueError(f"decode: {self.name} must know the origin of its latents, got none")
        tokenizer.check_origin("decode", self.origin.tokenizer_id, any_weights)
        if isinstance(latent, Tensor) and not latent.is_floating_point():
            latent = tokenizer.indices_to_latent(latent)
        size = (self.origin.height, self.origin.width)
        encoding = Encoding(latent, self.origin.num_frames, size, fps=self.origin.fps)
        return tokenizer.decode(encoding, output=output)

    # On disk.

    def facts(self) -> dict[str, Any]:
        """Returns what config.json holds beside the configuration."""
        return {
            "origin": None if self.origin is None else dataclasses.asdict(self.origin),
            "statistics": None if self.statistics is None else self.statistics.to_dict(),
        }

    def set_facts(self, facts: dict[str, Any]) -> None:
        """Returns None after taking over `facts()`. Raises ValueError for anything else."""
        origin, statistics = facts.get("origin"), facts.get("statistics")
        try:
            self.origin = None if origin is None else LatentOrigin(**origin)
        except TypeError as error:
            raise ValueError(f"LatentOrigin: must have its fields, got {error}") from error
        if statistics is not None:
            self.set_statistics(LatentStatistics.from_dict(statistics), "from_pretrained")

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes config.json and model.safetensors; each is complete or absent. Raises OSError."""
        _persistence.save_model(self, folder, self.facts())

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike) -> LatentGenerator:
        """Returns the generator saved in a folder or at a hub id `owner/name`, in eval mode.

        Raises:
            FileNotFoundError, ValueError: as `VideoTokenizer.from_pretrained`.
        """
        model, description = _persistence.read_model(cls, _persistence.resolve_folder(source))
        model.set_facts(description)
        return model

    def extra_repr(self) -> str:
        """Returns name and configuration, for printing."""
        fields = dataclasses.asdict(self.config)
        return f"{self.name}: " + ", ".join(f"{k}={v}" for k, v in fields.items())
