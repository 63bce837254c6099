"""Exact streams: one video pushed in any portions gives what one call on the whole clip gives.

Frames (or latents) wait until they fill the unit that the network consumes; the network's own
memory is the state that `encode_chunk` / `decode_chunk` take and return. Memory does not grow with
the length of the video. A stream can be saved at any point and resumed: `state_dict()` holds plain
tensors only, and the same pushes after resuming give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok_ext.layers._state import owned
from vtok_ext.models import _video_input as video_input
from vtok_ext.models.failed_computation import FailedComputationError

if TYPE_CHECKING:
    from vtok_ext.models.grid import GridTokenizer

_LAYER = "layer."


class _Stream:
    """What both directions share: counters, the network's state, and saving them.

    `_counters` names the integer attributes that are saved; None is stored as -1.
    """

    height: int | None
    width: int | None
    _op: str
    _counters: tuple[str, ...]

    def __init__(self, model: GridTokenizer, role: str) -> None:
        self.model = model
        self.flushed = False
        self._role = _role(role, model)
        self._state: dict[str, Tensor] | None = None
        # Frames [B, C, T, H, W] that have arrived or been decoded but not been handed on.
        self._waiting: Tensor | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) of the video, None while it is not known."""
        return None if self.height is None or self.width is None else (self.height, self.width)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns copies of all that the stream remembers: contiguous CPU tensors by name."""
        values = [getattr(self, name) for name in self._counters]
        state = {
            "role": torch.tensor(list(self._role.encode()), dtype=torch.uint8),
            "counters": torch.tensor([-1 if v is None else int(v) for v in values]),
        }
        if self._waiting is not None:
            state["waiting"] = self._waiting
        state.update({_LAYER + name: value for name, value in (self._state or {}).items()})
        return {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in state.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues where `state`, the `state_dict()` of a stream of the same model, was taken.

        Raises:
            ValueError: the state is not one of this kind of stream and model.
        """
        names = [name for name in state if not name.startswith(_LAYER)]
        if not {"role", "counters"} <= set(names) <= {"role", "counters", "waiting"}:
            raise ValueError(f"{self._op}: state must be that of a stream, got {sorted(names)}")
        role = bytes(state["role"].tolist()).decode(errors="replace")
        counters = state["counters"].tolist()
        if role != self._role or len(counters) != len(self._counters):
            raise ValueError(f"{self._op}: state must be that of {self._role}, got {role}")
        for name, value in zip(self._counters, counters, strict=True):
            old = getattr(self, name)
            setattr(self, name, bool(value) if isinstance(old, bool) else _optional(value))
        device = next(self.model.parameters()).device
        waiting = state.get("waiting")
        self._waiting = None if waiting is None else owned(waiting.to(device))
        layers = {
            name[len(_LAYER) :]: owned(value.to(device))
            for name, value in state.items()
            if name.startswith(_LAYER)
        }
        self._state = layers or None

    def _check_open(self, call: str) -> None:
        if self.flushed:
            raise ValueError(f"{self._op}.{call}: stream must be open, got a call after flush()")

    def _join(self, frames: Tensor) -> Tensor:
        """Returns the waiting frames followed by `frames`."""
        if self._waiting is None:
            return frames
        return torch.cat([self._waiting, frames], dim=2)

    def _wait(self, frames: Tensor) -> None:
        self._waiting = owned(frames) if frames.shape[2] else None


def _role(role: str, model: GridTokenizer) -> str:
    """Returns what a stream is and of which model, that states of others are told from."""
    view = f" in {model.view}" if model.view else ""
    return f"{role}{view} of {model.model_id}"


def _optional(value: int) -> int | None:
    return None if value < 0 else value


class StreamEncoder(_Stream):
    """Encodes one video pushed in portions; made by `VideoTokenizer.stream_encoder`.

    Attributes:
        num_frames: frames pushed so far; what decoding needs to crop to.
        size: (H, W) of the video; None before the first push.
    """

    _op = "stream_encoder"
    _counters = ("num_frames", "batch", "height", "width", "flushed")

    def __init__(self, model: GridTokenizer, output: str = "latent") -> None:
        if output not in ("latent", "tokens"):
            raise ValueError(f"stream_encoder: output must be 'latent' or 'tokens', got {output!r}")
        super().__init__(model, f"encoder to {output}")
        self.output = output
        self.num_frames = 0
        self.batch: int | None = None
        self.height = None
        self.width = None

    @torch.no_grad()
    def push(self, chunk: Tensor) -> list[Tensor]:
        """Returns what the frames complete: [], [latent [B, C, t, h, w]] or [ids [B, t, h, w]].

        Args:
            chunk: [B, 3, t, H, W], t >= 1, float in [-1, 1] or uint8; B, H, W as at the first push.

        Raises:
            TypeError, ValueError: a bad chunk, another shape than before, a stream that has ended,
            or NaN or infinity from the network, which ids would hide.
        """
        self._check_open("push")
        video_input.check_video("stream_encoder.push", chunk, self.model.video_channels)
        batch, _, num_frames, height, width = chunk.shape
        if self.batch is None:
            self.batch, self.height, self.width = batch, height, width
        elif (batch, height, width) != (self.batch, self.height, self.width):
            raise ValueError(
                f"stream_encoder.push: chunk must be [{self.batch}, {self.model.video_channels}, "
                f"t, {self.height}, {self.width}] as before, got {list(chunk.shape)}"
            )
        self.num_frames += num_frames
        frames = self._join(self._fit(video_input.to_float(chunk, self.model.dtype)))
        # The first latent covers the first frame alone, and waits for its unit if that is longer.
        first = 1 if self._state is None else 0
        least = first if self.model.latents_per_unit == 1 else first + self._unit
        complete = first + (frames.shape[2] - first) // self._unit * self._unit
        complete = complete if complete >= least else 0
        self._wait(frames[:, :, complete:])
        return self._encode(frames[:, :, :complete]) if complete else []

    @torch.no_grad()
    def flush(self) -> list[Tensor]:
        """Returns the rest and ends the stream; the last frame completes an unfinished group."""
        self._check_open("flush")
        self.flushed = True
        if self._waiting is None:
            return []
        frames, self._waiting = self._complete(self._waiting), None
        return self._encode(frames)

    @property
    def _unit(self) -> int:
        """Frames that are encoded together, after the first one."""
        return self.model.temporal_factor * self.model.latents_per_unit

    def _fit(self, frames: Tensor) -> Tensor:
        """Returns the frames in a size that the network takes."""
        return video_input.pad_size(frames, self.model.spatial_factor)

    def _complete(self, frames: Tensor) -> Tensor:
        """Returns the last, unfinished group with what it lacks."""
        return video_input.pad_tail(frames, self._unit, alone=1 if self._state is None else 0)

    def _encode(self, frames: Tensor) -> list[Tensor]:
        raw, self._state = self.model.encode_chunk(frames, self._state, return_state=True)
        # A quantizer makes ids of anything. Latents are few, and ids are soon waited for anyway.
        if self.output == "tokens" and not raw.isfinite().all():
            raise ValueError(
                f"stream_encoder: the model must give finite latents, got NaN or infinity within "
                f"{self.num_frames} frames"
            )
        latent, indices, _ = self.model.regularize(raw)
        return [latent if indices is None or self.output == "latent" else indices]


class StreamDecoder(_Stream):
    """Decodes latents or ids pushed in portions; made by `VideoTokenizer.stream_decoder`.

    A clip's last latent may stand for fewer than f frames. While `num_frames` is unknown, the f - 1
    frames that may have to go are therefore held back until the next push or `flush`. These are the
    very frames that linear interpolation (VidTok 1.1) leaves open until the next latent.
    """

    _op = "stream_decoder"
    _counters = (
        "num_latents",
        "num_emitted",
        "num_frames",
        "height",
        "width",
        "flushed",
        "batch",
        "rows",
        "columns",
    )

    def __init__(
        self,
        model: GridTokenizer,
        *,
        num_frames: int | None = None,
        size: tuple[int, int] | None = None,
        output: str = "float",
    ) -> None:
        if output not in ("float", "uint8"):
            raise ValueError(f"stream_decoder: output must be 'float' or 'uint8', got {output!r}")
        cropped = (1, 1) if size is None else size
        counts = [1 if num_frames is None else num_frames]
        counts += cropped if isinstance(cropped, tuple | list) else ()
        if len(counts) != 3 or not all(isinstance(n, Integral) and n >= 1 for n in counts):
            raise ValueError(
                "stream_decoder: num_frames and size (H, W) must be integers >= 1, "
                f"got {num_frames} and {size}"
            )
        super().__init__(model, f"decoder to {output}")
        self.output = output
        self.num_latents = 0
        self.num_emitted = 0
        self.num_frames = num_frames
        self.height = None if size is None else size[0]
        self.width = None if size is None else size[1]
        self.batch: int | None = None
        self.rows: int | None = None  # of the latents
        self.columns: int | None = None

    def _check_shape(self, latent: Tensor) -> None:
        """Raises ValueError for another batch or size than before, or one too small to crop."""
        found = latent.shape[0], *latent.shape[3:]
        if self.batch is None:
            available = [self.model.spatial_factor * n for n in found[1:]]
            wanted = self.size or available
            if wanted[0] > available[0] or wanted[1] > available[1]:
                raise ValueError(
                    f"stream_decoder.push: size must be within the decoded {available}, "
                    f"got {list(wanted)}"
                )
            self.batch, self.rows, self.columns = found
        elif found != (self.batch, self.rows, self.columns):
            raise ValueError(
                f"stream_decoder.push: latent must be [{self.batch}, {latent.shape[1]}, t, "
                f"{self.rows}, {self.columns}] as before, got {list(latent.shape)}"
            )

    @torch.no_grad()
    def push(self, latent: Tensor) -> list[Tensor]:
        """Returns the frames that are certain by now: [] or [video [B, 3, t, H, W]].

        Args:
            latent: [B, C, t, h, w], or ids [B, t, h, w] of a discrete model, t >= 1.

        Raises:
            TypeError, ValueError: a bad latent, another shape than before, or a stream that has
                ended.
            FailedComputationError: NaN or infinity from the network, which uint8 would hide.
        """
        self._check_open("push")
        latent = self.model.to_latent("stream_decoder.push", latent)
        self._check_shape(latent)
        frames, self._state = self.model.decode_chunk(latent, self._state, return_state=True)
        self.num_latents += latent.shape[2]
        frames = self._join(frames)
        certain = self.num_frames
        if certain is None:
            # n latents stand for at least (n - 2) f + 2 frames, those of a longer unit for fewer.
            known = self.num_latents - 1 - self.model.latents_per_unit
            certain = max(1, known * self.model.temporal_factor + 2)
        count = min(max(0, certain - self.num_emitted), frames.shape[2])
        # Beyond a known end nothing is needed any more.
        self._wait(frames[:, :, count:] if self.num_frames is None else frames[:, :, :0])
        return self._emit(frames[:, :, :count])

    @torch.no_grad()
    def flush(self, num_frames: int | None = None) -> list[Tensor]:
        """Returns the frames held back and ends the stream.

        Args:
            num_frames: frames of the whole clip; default what the stream was made with, else all.

        Raises:
            ValueError: fewer frames than already returned, or more than the latents hold.
        """
        self._check_open("flush")
        f, n = self.model.temporal_factor, self.num_latents
        available = 1 + (n - 1) * f if n else 0
        if self.num_frames is not None:
            available = min(available, self.num_frames)
        total = self.num_frames if num_frames is None else num_frames
        total = available if total is None else total
        if not self.num_emitted <= total <= available:
            raise ValueError(
                f"stream_decoder.flush: num_frames must be in {self.num_emitted}..{available}, "
                f"got {total}"
            )
        waiting, missing = self._waiting, total - self.num_emitted
        if self._state is not None and missing > (0 if waiting is None else waiting.shape[2]):
            rest = self.model.decode_rest(self._state)
            waiting = waiting if rest is None else self._join(rest)
        self.flushed, self._waiting = True, None
        return [] if waiting is None else self._emit(waiting[:, :, :missing])

    def _emit(self, frames: Tensor) -> list[Tensor]:
        if not frames.shape[2]:
            return []
        # uint8 would hide them; they are few, and soon waited for anyway.
        if self.output == "uint8" and not frames.isfinite().all():
            raise FailedComputationError(
                f"stream_decoder: the model must give finite frames, got NaN or infinity after "
                f"{self.num_emitted} frames"
            )
        self.num_emitted += frames.shape[2]
        return [self.model._finish("stream_decoder", frames, None, self.size, self.output)]
