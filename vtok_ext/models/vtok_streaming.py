"""VTok on a stream: every frame gives S tokens (first of a shot), one token (sampled) or none.

What is remembered is the key frame's feature map, the frame before in the size that cuts are found
on, and two counters: memory does not grow with the length of the video.

`encode_portions` is for files, where nobody waits for a token: it takes pictures by the same groups
as `VTok.encode`, hence gives the very bits of that, which pictures one by one do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok_ext.models import _video_input as video_input
from vtok_ext.models.encoding import Encoding
from vtok_ext.models.vtok_layout import FRAMES_PER_CALL, changes, positions_of, segments_from

if TYPE_CHECKING:
    from vtok_ext.models.vtok import VTok

_STATE = ("role", "num_frames", "size", "fps", "key", "before")


class VTokStreamEncoder:
    """Encodes one video pushed in portions; made by `VTok.stream_encoder`.

    Attributes:
        num_frames: frames pushed so far.
        size: (H, W) of the video, None before the first push.
        positions: int32 [n, 2], frame and slot of the tokens that the last push returned.
        fps: frames per second, for the sampling of frames; can be set before the first push.
    """

    def __init__(self, model: VTok, output: str = "latent") -> None:
        if output not in ("latent", "tokens"):
            raise ValueError(f"stream_encoder: output must be 'latent' or 'tokens', got {output!r}")
        if output == "tokens" and not model.is_discrete:
            raise model._continuous("stream_encoder")
        if model.config.key_frame != "first":
            raise ValueError(
                "stream_encoder: key_frame must be 'first' for a stream, got "
                f"{model.config.key_frame!r}, which needs the whole clip"
            )
        self.model, self.output = model, output
        self._fps: float | None = None
        self.num_frames, self.flushed = 0, False
        self.size: tuple[int, int] | None = None
        self.positions = torch.empty(0, 2, dtype=torch.int32)
        self._key: Tensor | None = None  # [B, C, h, w] feature map of the key frame
        self._before: Tensor | None = None  # [B, 3, H, W] the frame before, if cuts are looked for

    @property
    def fps(self) -> float | None:
        """Frames per second; None for the default of the model."""
        return self._fps

    @fps.setter
    def fps(self, value: float | None) -> None:
        if self.num_frames:
            raise ValueError(
                f"stream_encoder: fps must be set before the first push, got {value!r} after "
                f"{self.num_frames} frames"
            )
        self.model.frame_rule(value)  # refuses what is no rate
        self._fps = None if value is None else float(value)

    @torch.no_grad()
    def push(self, chunk: Tensor) -> list[Tensor]:
        """Returns the tokens that some frames give: [] or [latent [B, n, D]], or ids [B, n].

        Args:
            chunk: [B, 3, t, H, W], float in [-1, 1] or uint8; B, H, W as at the first push; B is 1
                where cuts are looked for, because they fall in other places in every clip.

        Raises:
            TypeError, ValueError: a bad chunk, or a stream that has ended.
        """
        if self.flushed:
            raise ValueError("stream_encoder.push: stream must be open, got a call after flush()")
        video_input.check_video("stream_encoder.push", chunk)
        size = (chunk.shape[3], chunk.shape[4])
        if self.size not in (None, size):
            raise ValueError(f"stream_encoder.push: chunk must be {self.size}, got {size}")
        batch = chunk.shape[0] if self._key is None else self._key.shape[0]
        if chunk.shape[0] != batch:
            raise ValueError(
                f"stream_encoder.push: chunk must have {batch} clips, as before, "
                f"got {chunk.shape[0]}"
            )
        if self.model.config.cut_threshold and chunk.shape[0] != 1:
            raise ValueError(
                f"stream_encoder.push: chunk must have one clip with cuts, got {chunk.shape[0]}"
            )
        self.size = size
        clip = video_input.to_float(chunk, self.model.dtype)
        parts: list[Tensor] = []
        positions: list[tuple[int, int]] = []
        for frame in clip.unbind(2):
            tokens = self._tokens_of(frame)
            if tokens is not None:
                slots = self.model.config.key_tokens
                is_key = tokens.shape[1] != 1 or self._is_new_key
                numbers = range(slots) if is_key else (slots,)
                positions += [(self.num_frames, slot) for slot in numbers]
                parts.append(tokens)
            self.num_frames += 1
        self.positions = torch.tensor(positions, dtype=torch.int32).view(-1, 2)
        if not parts:
            return []
        joined = torch.cat(parts, dim=1)
        quantizer = self.model.quantizer
        if quantizer is None:
            return [joined]
        codes, indices, _ = quantizer(self.model.to_levels(joined), 0, False)
        return [indices if self.output == "tokens" else codes]

    def _tokens_of(self, frame: Tensor) -> Tensor | None:
        """Returns tokens [B, n, D] of the next frame [B, 3, H, W], None if it gives none."""
        threshold = self.model.config.cut_threshold
        is_cut = self._key is None
        if threshold:
            if self._before is not None:
                is_cut = bool(changes(torch.cat([self._before, frame]))[0] > threshold)
            self._before = frame.clone()
        self._is_new_key = is_cut
        if is_cut:
            self._key = self.model.features(frame).contiguous()
            return self.model.key_tokens(self._key)
        if not self.model.frame_rule(self.fps).samples(self.num_frames):
            return None
        assert self._key is not None  # the first frame is a cut
        return self.model.residual(self.model.features(frame)[:, None], self._key)

    def flush(self) -> list[Tensor]:
        """Returns [] and ends the stream: no token waits for later frames."""
        self.flushed = True
        self.positions = self.positions[:0]
        return []

    def state_dict(self) -> dict[str, Tensor]:
        """Returns copies of all that the stream remembers: CPU tensors by name."""
        state = {
            "role": torch.tensor(list(self._role().encode()), dtype=torch.uint8),
            "num_frames": torch.tensor([self.num_frames, int(self.flushed)]),
            "size": torch.tensor(self.size or (0, 0)),
            "fps": torch.tensor([self.fps or 0.0], dtype=torch.float64),
        }
        for name, value in (("key", self._key), ("before", self._before)):
            if value is not None:
                state[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues where `state`, the `state_dict()` of a stream of the same model, was taken.

        Raises:
            ValueError: the state is not one of this kind of stream and model.
        """
        if not set(_STATE[:4]) <= set(state) <= set(_STATE):
            raise ValueError(f"stream_encoder: state must be that of a stream, got {sorted(state)}")
        role = bytes(state["role"].tolist()).decode(errors="replace")
        if role != self._role():
            raise ValueError(f"stream_encoder: state must be that of {self._role()}, got {role}")
        num_frames, flushed = state["num_frames"].tolist()
        needed = set(_STATE) if self.model.config.cut_threshold else set(_STATE[:5])
        if num_frames and not needed <= set(state):
            raise ValueError(
                f"stream_encoder: state must have {', '.join(sorted(needed))} after {num_frames} "
                f"frames, got {sorted(state)}"
            )
        self.num_frames, self.flushed = num_frames, bool(flushed)
        height, width = state["size"].tolist()
        self.size = (height, width) if height else None
        self._fps = state["fps"].item() or None
        device = next(self.model.parameters()).device
        self._key = state["key"].to(device) if "key" in state else None
        self._before = state["before"].to(device) if "before" in state else None

    def _role(self) -> str:
        return f"vtok encoder to {self.output} of {self.model.model_id}"


class _Segments:
    """The tokens of one clip whose frames are taken one after the other, see `encode_portions`."""

    def __init__(self, model: VTok, fps: float | None) -> None:
        self.model, self.rule = model, model.frame_rule(fps)
        self.num_frames, self.starts = 0, [0]
        self.parts: list[Tensor] = []  # [1, n, D]
        self._waiting: list[Tensor] = []  # sampled frames [1, 3, H, W] without tokens
        self._key: Tensor | None = None
        self._before: Tensor | None = None

    def take(self, frame: Tensor) -> None:  # [1, 3, H, W]
        """Returns None after the next frame; what is kept of it is a copy."""
        is_cut = self._is_cut(frame)
        if self._key is None or is_cut:
            self.tell()
            self._key = self._maps([frame])[:, 0]
            self.parts.append(self.model.key_tokens(self._key))
            if self.num_frames:
                self.starts.append(self.num_frames)
        elif self.rule.samples(self.num_frames):
            self._waiting.append(frame.clone())
            if len(self._waiting) == FRAMES_PER_CALL:
                self.tell()
        self.num_frames += 1

    def _is_cut(self, frame: Tensor) -> bool:
        threshold = self.model.config.cut_threshold
        if not threshold:
            return False
        before, self._before = self._before, frame.clone()
        if before is None:
            return False
        pictures = video_input.to_float(torch.cat([before, frame]), self.model.dtype)
        return bool(changes(pictures)[0] > threshold)

    def tell(self) -> None:
        """Returns None after giving the waiting frames their tokens."""
        if self._waiting:
            assert self._key is not None  # frames wait behind a key frame
            self.parts.append(self.model.residual(self._maps(self._waiting), self._key))
            self._waiting = []

    def _maps(self, frames: list[Tensor]) -> Tensor:
        clip = torch.cat(frames).transpose(0, 1)[None]
        return self.model._frame_maps(clip, tuple(range(len(frames))))


@torch.no_grad()
def encode_portions(
    model: VTok,
    portions: Iterable[Tensor],  # [1, 3, t, H, W] each
    *,
    fps: float | None = None,
) -> Encoding:
    """Returns what `model.encode` gives for the clip that the portions make up, to the bit.

    One portion, at most 16 frames and all tokens exist at a time. Without losses.

    Args:
        model: whose key frames are the first ones.
        portions: [1, 3, t, H, W], float in [-1, 1] or uint8; H, W of all as of the first.
        fps: as for `encode`.

    Raises:
        TypeError, ValueError: a bad portion, or none; a model that chooses its key frames.
    """
    if model.config.key_frame != "first":
        raise ValueError(
            f"encode: key_frame must be 'first' for portions, got {model.config.key_frame!r}, "
            "which needs the whole clip"
        )
    segments, size = _Segments(model, fps), None
    for portion in portions:
        video_input.check_video("encode", portion)
        shape = (portion.shape[0], *portion.shape[3:])
        size = shape if size is None else size
        if shape != size or shape[0] != 1:
            raise ValueError(
                f"encode: portions must be of one clip and one size, got {list(portion.shape)}"
                + ("" if shape == size else f" after [{size[0]}, 3, t, {size[1]}, {size[2]}]")
            )
        for frame in portion[0].transpose(0, 1).split(1):
            segments.take(frame)
    segments.tell()
    if size is None:
        raise ValueError("encode: portions must have at least one frame, got none")
    tokens, indices = torch.cat(segments.parts, dim=1), None
    if model.quantizer is not None:
        tokens, indices, _ = model.quantizer(model.to_levels(tokens), 0, False)
    plan = segments_from(segments.starts, segments.num_frames, segments.rule)
    return Encoding(
        tokens,
        segments.num_frames,
        (size[1], size[2]),
        indices=indices,
        fps=None if fps is None else float(fps),
        positions=positions_of(plan, model.config.key_tokens)[None].to(tokens.device),
    )
