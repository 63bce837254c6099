"""What all rows of a VTok study share: captioned clips, one trained image encoder, its maps."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vtok_ext.data.atomic_output import output_file
from vtok_ext.data.captioned import CaptionedClips, Question, questions_of
from vtok_ext.models.vision_encoder import SmallViT, resized
from vtok_ext.models.vision_mae import MaskedAutoencoder
from vtok_ext.training.studies.clip_store import fingerprint
from vtok_ext.training.studies.kinds import Progress

HELD_OUT_SEED = 1_000_000_000
# Part of the files' names: another number when clips, encoder or its training change.
_REVISION = 2
_MAE_BATCH, _MAE_LR = 32, 1e-3
_FRAMES_PER_CALL = 64


@dataclass(frozen=True)
class EncoderSettings:
    """The small ViT, and its training on single frames of the training clips."""

    image_size: int
    patch: int
    dim: int
    depth: int
    heads: int
    steps: int


class StudyClips:
    """Captioned clips of one split with the encoder's maps, [N, T, C, h, w] float16.

    Args:
        folder: shared by all runs of the study.
        clips: which.
        encoder: settings of the encoder, which is trained if it is not in the folder yet.
        progress: see `kinds`.
    """

    def __init__(
        self,
        folder: Path,
        clips: CaptionedClips,
        encoder: EncoderSettings,
        training_clips: CaptionedClips,
        progress: Progress,
    ) -> None:
        self.clips = clips
        self.encoder = trained_encoder(folder, training_clips, encoder, progress)
        # Another encoder has other maps: its training is a part of their name.
        path = _path(folder, "maps", _of(clips), _of(training_clips), encoder)
        self.maps = _maps(path, clips, self.encoder, encoder.image_size, progress)

    def questions(self, index: int) -> list[Question]:
        """Returns the questions to clip `index`."""
        return questions_of(self.clips.scene(index))

    def videos(self) -> Tensor:
        """Returns the clips [N, 3, T, H, W] uint8, drawn anew."""
        return torch.stack([self.clips.clip(i).video for i in range(len(self.clips))])

    def fingerprint(self) -> str:
        """Returns what identifies the clips."""
        return fingerprint(self.videos())


def _path(folder: Path, kind: str, *settings: object) -> Path:
    text = json.dumps([_REVISION, kind, *(str(value) for value in settings)])
    return folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"


def _of(clips: CaptionedClips) -> tuple:
    return (clips.num_clips, clips.shape, clips.split, clips.first_seed)


def trained_encoder(
    folder: Path, clips: CaptionedClips, settings: EncoderSettings, progress: Progress
) -> SmallViT:
    """Returns the encoder, frozen; trained by masked autoencoding once for all rows and seeds.

    Args:
        folder: shared by all runs of the study.
        clips: to train on, single frames.
        settings: of the encoder; 0 steps for random weights.
        progress: see `kinds`.
    """
    from safetensors.torch import load_file, save_file

    path = _path(folder, "encoder", _of(clips), settings)
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    shape = (settings.patch, settings.dim, settings.depth, settings.heads)
    encoder = SmallViT(settings.image_size, *shape)
    if not path.exists():
        model = MaskedAutoencoder(encoder)
        optimizer = torch.optim.AdamW(model.parameters(), _MAE_LR, betas=(0.9, 0.95))
        generator = torch.Generator().manual_seed(0)
        stock = _frames(clips, generator)
        for step in range(settings.steps):
            chosen = torch.randint(len(stock), (_MAE_BATCH,), generator=generator)
            images = resized(stock[chosen].float() / 127.5 - 1, settings.image_size)
            loss = model(images, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress(0.1 * step / settings.steps, f"encoder, loss {loss.item():.3f}")
        model.finish()
        with output_file(path, "study") as partial:
            save_file(encoder.state_dict(), partial)
    encoder.load_state_dict(load_file(path))
    torch.random.set_rng_state(torch_state)
    return encoder.eval()


def _frames(clips: CaptionedClips, generator: torch.Generator) -> Tensor:
    """Returns two random frames [2 N, 3, H, W] uint8 of each clip."""
    found = []
    for index in range(len(clips)):
        video = clips.clip(index).video
        for frame in torch.randint(video.shape[1], (2,), generator=generator).tolist():
            found.append(video[:, frame])
    return torch.stack(found)


@torch.no_grad()
def _maps(
    path: Path,
    clips: CaptionedClips,
    encoder: SmallViT,
    image_size: int,
    progress: Progress,
) -> Tensor:
    """Returns [N, T, C, h, w] float16, computed once and kept at `path`."""
    from safetensors.torch import load_file, save_file

    if not path.exists():
        parts = []
        for index in range(len(clips)):
            frames = clips.clip(index).video.transpose(0, 1).float() / 127.5 - 1
            images = resized(frames, image_size)
            done = [encoder(part).half() for part in images.split(_FRAMES_PER_CALL)]
            parts.append(torch.cat(done))
            progress(0.1 + 0.1 * index / len(clips), "feature maps")
        # Channels last, as attention pooling reads them.
        maps = torch.stack(parts).permute(0, 1, 3, 4, 2).contiguous()
        with output_file(path, "study") as partial:
            save_file({"maps": maps}, partial)
    return load_file(path)["maps"].permute(0, 1, 4, 2, 3)
