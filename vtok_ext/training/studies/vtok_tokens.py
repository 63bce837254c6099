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

    def _encode(
        self, video: Tensor, fps: float | None, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Returns tokens, positions, ids and FSQ's loss of maps [B, T, C, h, w]."""
        tokens, positions = self._show(video)
        quantizer = self.tokenizer.quantizer
        if quantizer is None:
            return tokens, positions, None, None
        codes, indices, losses = quantizer(self.tokenizer.to_levels(tokens), step)
        return codes, positions, indices, losses.get("aux_loss")

    def _show(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        batch, num_frames = maps.shape[:2]
        slots = self.tokenizer.config.key_tokens
        if self.shown == "blind":
            empty = maps.new_empty(batch, 0, self.tokenizer.config.token_dim)
            return empty, torch.empty(batch, 0, 2, dtype=torch.int32, device=maps.device)
        if self.shown in ("frames", "all_frames"):
            frames = self.frames_shown(num_frames)
            tokens = [self.tokenizer.key_tokens(maps[:, frame]) for frame in frames]
            places = [(frame, slot) for frame in frames for slot in range(slots)]
            return torch.cat(tokens, 1), self._placed(places, maps)
        sampled = self.tokenizer.frame_rule().frames(1, num_frames)
        if self.shown == "frame_tokens":
            frames = [0, *sampled]
            pooled = F.adaptive_avg_pool2d(maps[:, frames].flatten(0, 1), 1).flatten(1)
            tokens = self.frame_projection(pooled.unflatten(0, (batch, len(frames))))
            return tokens, self._placed([(frame, slots) for frame in frames], maps)
        return self._vtok(maps, torch.tensor([0, *sampled], device=maps.device))

    def _vtok(self, maps: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Returns tokens and positions of a key frame and the residuals of the other frames."""
        batch, count = maps.shape[0], len(frames)
        seen = maps[:, frames]  # [B, n, C, h, w]
        key = torch.zeros(batch, dtype=torch.long, device=maps.device)
        if self.key_frame == "auto":
            points = seen.flatten(2).float()
            key = (points - points.mean(1, keepdim=True)).square().sum(2).argmin(1)
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

    @staticmethod
    def _placed(places: list[tuple[int, int]], maps: Tensor) -> Tensor:
        found = torch.tensor(places, dtype=torch.int32, device=maps.device)
        return found.expand(maps.shape[0], -1, -1)
