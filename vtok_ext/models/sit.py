"""SiT: a flow transformer that makes latents of clips, planes of CoordTok or grids of VidTok.

    v = SiT(x_t, t, y),   x_0 noise, x_1 = (latent - mean) / std

The planes xy, yt, xt [B, C, rows, columns] are one sequence of tokens; a patch embedding, an output
layer and a type vector per plane tell them apart. `sample` integrates the flow and undoes the
normalisation, in the layout of the tokenizer.
Source: CoordTok (arXiv 2411.14762) with SiT (arXiv 2401.08740); specification section 9.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtok_ext.layers.kl import Generators
from vtok_ext.models._config import closest
from vtok_ext.models.coordtok_networks import PatchEmbedding
from vtok_ext.models.failed_computation import FailedComputationError
from vtok_ext.models.generator import LatentGenerator
from vtok_ext.models.latent_statistics import LatentStatistics
from vtok_ext.models.ode import sample_ode
from vtok_ext.models.sde import sample_sde
from vtok_ext.models.sit_config import GRID, SIT_PRESETS, SiTConfig
from vtok_ext.models.sit_network import (
    FinalLayer,
    LabelEmbedder,
    SiTBlock,
    TimestepEmbedder,
    sincos_1d,
    sincos_2d,
    unpatchify,
)
from vtok_ext.models.transport import Network, Transport, map_state, noise_like, state_parts

Parts = dict[str, Tensor]
# Samplers and what `sample` may be told about them.
SAMPLERS = {
    "sde": ("method", "num_steps", "diffusion", "norm", "last_step", "last_step_size", "noise"),
    "ode": ("method", "num_steps", "start", "stop", "rtol", "atol", "max_steps"),
}


class SiT(LatentGenerator):
    """Returns a SiT; see `LatentGenerator` for saving, loading and what it is trained on.

    Its input and output are normalised latents, channels first: a dict of planes
    {"xy": [B, C, Rx, Ry], "yt": [B, C, Rt, Ry], "xt": [B, C, Rt, Rx]}, or {"grid": [B, C, t, h,
    w]}; a bare tensor stands for a grid.
    """

    config: SiTConfig
    config_class = SiTConfig
    presets = SIT_PRESETS

    def __init__(self, config: SiTConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        dim = config.hidden_size
        self.num_outputs = config.in_channels * (2 if config.learn_sigma else 1)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(config.num_classes, dim, config.has_none)
        for part in config.parts():
            patch = config.part_patch(part)
            embedding = PatchEmbedding(config.in_channels, dim, patch)
            self.add_module(_named("x_embedder", part), embedding)
            outputs = self.num_outputs * torch.Size(patch).numel()
            self.add_module(_named("final_layer", part), FinalLayer(dim, outputs))
        self._add_positions()
        self.blocks = nn.ModuleList(SiTBlock(dim, config.num_heads) for _ in range(config.depth))
        self._initialize()

    def _add_positions(self) -> None:
        """Adds fixed vectors of rows and columns, and trained ones of time and kind of plane."""
        config, dim = self.config, self.config.hidden_size
        time, rows, columns = (
            config.part_grid(GRID)
            if config.latent == "grid"
            else (config.part_grid("yt")[0], *config.part_grid("xy"))
        )
        fixed = sincos_2d(rows, columns, dim)[None]
        self.pos_embed_xy = nn.Parameter(fixed, requires_grad=False)
        if config.latent == "grid":
            # Trained from the same kind of vectors, one per latent frame.
            self.pos_embed_t = nn.Parameter(sincos_1d(torch.arange(time), dim).float()[None])
            return
        # Shared by both planes over time: the columns of the wider one.
        self.pos_embed_t = nn.Parameter(torch.zeros(1, time * max(rows, columns), dim))
        self.type_embed = nn.Parameter(torch.randn(1, len(config.parts()), dim))

    def _initialize(self) -> None:
        """Sets the weights as published: the output is zero, every block the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for weight in (
            self.y_embedder.embedding_table.weight,
            *(self.t_embedder.mlp.get_parameter(f"{i}.weight") for i in (0, 2)),
        ):
            nn.init.normal_(weight, std=0.02)
        for name, parameter in self.named_parameters():
            if ".adaLN_modulation." in name or ".linear." in name:
                nn.init.zeros_(parameter)

    @property
    def transport(self) -> Transport:
        """Path and prediction that the model is trained for."""
        return Transport(self.config.path, self.config.prediction)

    def require_statistics(self, op: str) -> LatentStatistics:
        """Returns the statistics. Raises ValueError when there are none, or those of others."""
        statistics, config = super().require_statistics(op), self.config
        found = {part: mean.numel() for part, mean in statistics.mean.items()}
        expected = dict.fromkeys(config.parts(), config.in_channels)
        if found != expected:
            raise ValueError(
                f"{op}: statistics must be of {expected} channels for {self.name}, got {found}"
            )
        return statistics

    def _positions(self, part: str) -> Tensor:
        """Returns [1, N, D] of the tokens of a part."""
        config = self.config
        if part == GRID:
            time = self.pos_embed_t[:, :, None]
            return (time + self.pos_embed_xy[:, None]).flatten(1, 2)
        kind = self.type_embed[:, [config.parts().index(part)]]
        if part == "xy":
            return self.pos_embed_xy + kind
        rows, columns = config.part_grid(part)
        return self.pos_embed_t.unflatten(1, (rows, -1))[:, :, :columns].flatten(1, 2) + kind

    def forward(self, x: Parts | Tensor, t: Tensor, y: Tensor | None = None) -> Any:
        """Returns the prediction at normalised latents x, times t and labels y, as x.

        Args:
            x: dict of parts [B, C, ...], or a bare tensor of a grid; see the class.
            t: [B] in [0, 1], 0 noise, 1 data.
            y: integer labels [B]; `num_classes` is "none" where there is one. Default 0.

        Raises:
            TypeError, ValueError: a part is missing or has another shape, there is not one time and
                one label for each sample, or a label is none; see `check_labels`.
        """
        parts = self._checked({GRID: x} if isinstance(x, Tensor) else x)
        if y is None:
            y = torch.zeros(t.shape[0], dtype=torch.long, device=t.device)
        batches = {part: value.shape[:1] for part, value in parts.items()}
        if any(shape != t.shape for shape in (*batches.values(), y.shape)):
            found = {part: shape[0] for part, shape in batches.items()}
            raise ValueError(
                f"SiT: t and y must be [B] for B samples, got {list(t.shape)} and {list(y.shape)} "
                f"for {found}"
            )
        config = self.config
        self.check_labels("SiT", y, len(y), config.num_classes + int(config.has_none))
        condition = self.t_embedder(t) + self.y_embedder(y)
        tokens = []
        for part, value in parts.items():
            embedded = getattr(self, _named("x_embedder", part))(value)
            tokens.append(embedded + self._positions(part).to(embedded.dtype))
        z = torch.cat(tokens, dim=1)
        for block in self.blocks:
            z = block(z, condition)
        pieces = z.split([piece.shape[1] for piece in tokens], dim=1)
        out: Parts = {}
        for (part, value), piece in zip(parts.items(), pieces, strict=True):
            patches = getattr(self, _named("final_layer", part))(piece, condition)
            whole = unpatchify(patches, config.part_grid(part), config.part_patch(part))
            out[part] = whole[:, : value.shape[1]]
        return out[GRID] if isinstance(x, Tensor) else out

    def _checked(self, parts: Parts) -> Parts:
        """Returns the parts in order."""
        names = self.config.parts()
        if not isinstance(parts, dict) or set(parts) != set(names):
            found = sorted(parts) if isinstance(parts, dict) else type(parts).__name__
            raise TypeError(f"SiT: x must be a dict of {', '.join(names)}, got {found}")
        for name, value in parts.items():
            shape = (self.config.in_channels, *self.config.part_size(name))
            if value.shape[1:] != shape:
                form = ", ".join(map(str, shape))
                raise ValueError(f"SiT: {name} must be [B, {form}], got {list(value.shape)}")
        return {name: parts[name] for name in names}

    def network(self, labels: Tensor | None = None, guidance: float = 1.0) -> Network:
        """Returns network(x, t) for samplers: one pass per call, in the dtype of the weights.

        prediction = none + guidance * (label - none), both in one batch; 1 is no guidance.

        Args:
            labels: [B] integers; default 0.
            guidance: its strength; below 0 it leads away from the label.

        Raises:
            ValueError: guidance that is not finite, or of a model without a "none".
        """
        if not math.isfinite(guidance):
            raise ValueError(f"SiT: guidance must be finite, got {guidance}")
        dtype = self.y_embedder.embedding_table.weight.dtype

        def in_own_dtype(x: Any) -> Any:
            return map_state(lambda part: part.to(dtype), x)

        if guidance == 1.0:
            return lambda x, t: self(in_own_dtype(x), t, labels)
        if not self.config.has_none:
            raise ValueError(
                f"SiT: guidance must be 1 for a model trained without class_dropout, got {guidance}"
            )

        def between(both: Tensor) -> Tensor:
            label, none = both.chunk(2)
            return none + guidance * (label - none)

        def guided(x: Any, t: Tensor) -> Any:
            y = torch.zeros_like(t, dtype=torch.long) if labels is None else labels
            none = torch.full_like(y, self.config.num_classes)
            double = map_state(lambda value: torch.cat([value, value]), in_own_dtype(x))
            return map_state(between, self(double, torch.cat([t, t]), torch.cat([y, none])))

        return guided

    def loss(
        self,
        latent: Parts | Tensor,
        labels: Tensor | None = None,
        generator: Generators = None,
        call: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Returns the training loss [B] of a tokenizer's latents.

        Args:
            latent: in the layout of the tokenizer, not normalised.
            labels: [B] integers; default 0; in training some are replaced by "none".
            generator: source of noise, times and replaced labels, or one per sample.
            call: the model as it must be called, such as DistributedDataParallel's; default itself.
        """
        x1 = self.require_statistics("loss").normalize(latent)
        t, x0 = self.transport.draw(x1, generator)
        labels = self.training_labels(labels, t.shape[0], generator)
        network = call or self
        return self.transport.loss(lambda x, at: network(x, at, labels), x1, t=t, x0=x0)

    @torch.no_grad()
    def sample(
        self,
        num_samples: int = 1,
        *,
        labels: Tensor | None = None,
        guidance: float = 1.0,
        sampler: str = "sde",
        generator: Generators = None,
        **options: Any,
    ) -> Parts | Tensor:
        """Returns latents in the layout of the tokenizer, ready for its `decode`.

        They have the dtype of the weights; noise and state have 32 bits or more.

        Args:
            num_samples: B.
            labels: integers [B]; default 0.
            guidance: see `network`.
            sampler: "sde" (the published recipe: 250 steps) or "ode".
            generator: source of all noise, or one per sample; CPU generators give the same on every
                device.
            **options: of `sample_sde` or `sample_ode`.

        Raises:
            ValueError: an unknown sampler, labels out of range, or a model without the statistics
                of its latents.
            RuntimeError: the network gives NaN or infinity.
        """
        if sampler not in SAMPLERS:
            raise ValueError(
                f"sample: sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}"
            )
        for name in options:
            if name not in SAMPLERS[sampler]:
                raise ValueError(
                    f"sample: options of {sampler} must be among {', '.join(SAMPLERS[sampler])}, "
                    f"got {name!r}{closest(name, SAMPLERS[sampler])}"
                )
        labels = self.checked_labels("sample", labels, num_samples)
        statistics = self.require_statistics("sample")
        shape = (num_samples, self.config.in_channels)
        weight = self.y_embedder.embedding_table.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        empty = {
            p: weight.new_empty(*shape, *self.config.part_size(p), dtype=dtype)
            for p in self.config.parts()
        }
        noise = noise_like(empty, generator)
        network = self.network(labels, guidance)
        if sampler == "ode":
            x = sample_ode(self.transport, network, noise, **options)
        else:
            x = sample_sde(self.transport, network, noise, generator=generator, **options)
        if not all(bool(part.isfinite().all()) for part in state_parts(x)):
            raise FailedComputationError(
                f"sample: latents of {self.name} must be finite, got NaN or infinity; its weights "
                "are damaged, or guidance, norm or steps too large for them"
            )
        made: Any = statistics.denormalize(x)
        return map_state(lambda part: part.to(weight.dtype), made)


def _named(stem: str, part: str) -> str:
    return stem if part == GRID else f"{stem}_{part}"
