"""How a study's row shows a clip to the language model, from the encoder's feature maps.

    blind         nothing
    frames        S tokens of each of K frames, evenly apart
    frame_tokens  one pooled token of every sampled frame, no key frame
    vtok          S tokens of the key frame, a residual token of every other sampled frame
    all_frames    S tokens of every frame

The encoder is frozen and the same for all rows, so its maps are computed once for all of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.models.vtok import VTok
from vtok_ext.models.vtok_config import KEY_FRAMES
from vtok_ext.models.vtok_layout import nearest_to_mean
from vtok_ext.models.vtok_lm import VTokLM
from vtok_ext.models.vtok_lm_config import VTokLMConfig
from vtok_ext.models.vtok_text import TextTokenizer

SHOWN = ("blind", "frames", "frame_tokens", "vtok", "all_frames")


class StudyLM(VTokLM):
    """A VTokLM whose "videos" are feature maps [B, T, C, h, w] and which shows them as a row says.

    Args:
        config, tokenizer, text: see VTokLM.
        shown: one of SHOWN.
        num_shown: K of "frames".
        key_frame: of "vtok", "first" or "auto".
    """

    def __init__(
        self,
        config: VTokLMConfig,
        tokenizer: VTok,
        text: TextTokenizer,
        *,
        shown: str,
        num_shown: int,
        key_frame: str,
    ) -> None:
        super().__init__(config, tokenizer, text)
        if shown not in SHOWN or key_frame not in KEY_FRAMES:
            raise ValueError(
                f"study: shown and key_frame must be among {SHOWN} and {KEY_FRAMES}, "
                f"got {shown!r} and {key_frame!r}"
            )
        self.shown, self.num_shown, self.key_frame = shown, num_shown, key_frame
        channels, dim = tokenizer.encoder.channels, tokenizer.config.token_dim
        self.frame_projection = nn.Linear(channels, dim)

    def frames_shown(self, num_frames: int) -> list[int]:
        """Returns the frames that "frames" shows: the middles of equal parts of the clip."""
        count = num_frames if self.shown == "all_frames" else self.num_shown
        return [int((i + 0.5) * num_frames / count) for i in range(count)]

    def positions_for(self, num_frames: int, fps: float | None) -> Tensor:
        """Returns int32 [L, 2]: frame and slot of what the row shows of a video of T frames."""
        return self._places(num_frames)

    def _encode(
        self, video: Tensor, fps: float | None, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Returns tokens, positions, ids and FSQ's loss of maps [B, T, C, h, w]."""
        tokens, positions = self._show(self._maps(video))
        quantizer = self.tokenizer.quantizer
        if quantizer is None:
            return tokens, positions, None, None
        codes, indices, losses = quantizer(self.tokenizer.to_levels(tokens), step)
        return codes, positions, indices, losses.get("aux_loss")

    def _maps(self, video: Tensor) -> Tensor:
        """Returns standardised maps [B, T, C, h, w] of what `forward` is given."""
        return self.tokenizer.standardised(video)

    def _places(self, num_frames: int) -> Tensor:
        slots = self.tokenizer.config.key_tokens
        places: list[tuple[int, int]] = []
        if self.shown in ("frames", "all_frames"):
            frames = self.frames_shown(num_frames)
            places = [(frame, slot) for frame in frames for slot in range(slots)]
        elif self.shown == "frame_tokens":
            places = [(frame, slots) for frame in self._sampled(num_frames)]
        elif self.shown == "vtok":
            return self.tokenizer.default_positions(num_frames)
        return torch.tensor(places, dtype=torch.int32).view(-1, 2)

    def _sampled(self, num_frames: int) -> list[int]:
        return [0, *self.tokenizer.frame_rule().frames(1, num_frames)]

    def _show(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Returns tokens [B, L, D] and positions [B, L, 2]."""
        batch, num_frames = maps.shape[:2]
        if self.shown == "vtok":
            return self._vtok(maps, torch.tensor(self._sampled(num_frames), device=maps.device))
        if self.shown == "blind":
            tokens = maps.new_empty(batch, 0, self.tokenizer.config.token_dim)
        elif self.shown == "frame_tokens":
            frames = self._sampled(num_frames)
            pooled = F.adaptive_avg_pool2d(maps[:, frames].flatten(0, 1), 1).flatten(1)
            tokens = self.frame_projection(pooled.unflatten(0, (batch, len(frames))))
        else:
            shown = self.frames_shown(num_frames)
            tokens = torch.cat([self.tokenizer.key_tokens(maps[:, frame]) for frame in shown], 1)
        return tokens, self._places(num_frames).to(maps.device).expand(batch, -1, -1)

    def _vtok(self, maps: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Returns tokens and positions of a key frame and the residuals of the other frames."""
        batch, count = maps.shape[0], len(frames)
        seen = maps[:, frames]  # [B, n, C, h, w]
        key = torch.zeros(batch, dtype=torch.long, device=maps.device)
        if self.key_frame == "auto":
            points = self.tokenizer._pooled(seen.flatten(0, 1)).unflatten(0, (batch, count))
            key = nearest_to_mean(points)
        order = torch.arange(count, device=maps.device).expand(batch, -1)
        others = order[order != key[:, None]].view(batch, count - 1)
        rows = torch.arange(batch, device=maps.device)
        key_maps = seen[rows, key]
        residual = self.tokenizer.residual(seen[rows[:, None], others], key_maps)
        tokens = torch.cat([self.tokenizer.key_tokens(key_maps), residual], dim=1)
        slots = self.tokenizer.config.key_tokens
        slot = torch.cat([torch.arange(slots), torch.full((count - 1,), slots)]).to(maps.device)
        frame = torch.cat([frames[key][:, None].expand(-1, slots), frames[others]], dim=1)
        return tokens, torch.stack([frame, slot.expand(batch, -1)], dim=2).int()


class VideoStudyLM(StudyLM):
    """A StudyLM that may be given videos [B, 3, T, H, W] uint8 as well, as its decoder is."""

    def _maps(self, video: Tensor) -> Tensor:
        """Returns standardised maps [B, T, C, h, w] of videos, or of maps in floating point."""
        if video.is_floating_point():
            return super()._maps(video)
        clip = self._float_video(video)
        with torch.no_grad():
            return self.tokenizer._frame_maps(clip, tuple(range(clip.shape[2])))
