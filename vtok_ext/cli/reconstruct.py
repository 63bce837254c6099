"""`vtok reconstruct`: a video of any length through a model and back, in constant memory.

Frames are pushed into the model's stream encoder and what comes out into its stream decoder; both
are exact, so the result is that of the whole clip. Quality is accumulated on the way. Models
without an exact stream (CoordTok, VTok) get all frames at once, up to --max-frames.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vtok_ext.data.video import VideoInfo, VideoReader, VideoWriter

from .console import Console, Progress
from .memory_plan import NO_LIMIT, MemoryOptions, arrange_freed_memory, peak_bytes, prepare
from .model_source import load_model_for, resolve_device
from .whole_clip import read_whole

# A chunk is sized so that one feature map at full resolution takes about this much memory; a pass
# holds a handful of them.
_FEATURE_MAP_BYTES = 2**26
# Longer chunks of small pictures bring memory, not speed: measured, 2.1 s for 320 frames of 64x64
# in chunks of 16 and of 64, with a peak of 702 and of 950 MB.
_MOST_FRAMES_PER_CHUNK = 16


def run_reconstruct(
    *,
    video: Path,
    model_source: str,
    output: Path | None,
    name: str | None,
    side_by_side: bool,
    max_frames: int | None,
    device: str,
    as_json: bool,
    ema: bool = False,
    trust_checkpoint: bool = False,
    slices: int | None = None,
    memory: MemoryOptions = NO_LIMIT,
) -> None:
    """Returns None after writing the reconstruction and printing its quality.

    `slices`: see `CoordTok.decode`.
    """
    from vtok_ext.models import CoordTok

    console = Console(as_json)
    output = Path(f"{video.stem}.vtok.mp4") if output is None else output
    with VideoReader(video) as reader:
        if output.exists() and output.samefile(video):
            raise ValueError(
                f"reconstruct: output must be another file than the input, got {output}"
            )
        target = resolve_device(device)
        arrange_freed_memory(memory)
        info = reader.info
        pair_width = info.width * 2 if side_by_side else info.width
        with VideoWriter(
            output,
            height=info.height,
            width=pair_width,
            fps=info.fps or 30,
            time_base=info.time_base,
            pixel_aspect=info.pixel_aspect,
        ) as writer:
            model, is_random = load_model_for(
                model_source, name, target, console, ema=ema, trust_checkpoint=trust_checkpoint
            )
            if slices is not None and not isinstance(model, CoordTok):
                raise ValueError(
                    f"reconstruct: --slices must be given for a CoordTok, got {model.name}"
                )
            total = _frames_expected(info, max_frames)
            console.say(
                f"{video.name}: {info.width}x{info.height}, "
                f"{total or 'unknown number of'} frames, on {target}"
            )
            chunk_frames = frames_per_chunk(model, info.height, info.width)
            size = (info.height, info.width, total)
            prepared = prepare(model, "reconstruct", *size, memory, chunk_frames, console)
            run = _Reconstruction(
                prepared.model, info, writer, side_by_side, prepared.chunk_frames, slices
            )
            with console.progress("reconstructing", total) as progress:
                run.process(reader, max_frames, progress)
    report = run.report(video, output, is_random, str(target)) | prepared.facts
    report["peak_bytes"] = peak_bytes(model)
    console.result(report, _summary(report))


def _frames_expected(info: VideoInfo, max_frames: int | None) -> int | None:
    known = [count for count in (info.num_frames, max_frames) if count is not None]
    return min(known) if known else None


def frames_per_chunk(model: Any, height: int, width: int) -> int:
    """Returns a multiple of the temporal factor within the memory limit."""
    factor = model.temporal_factor or 1
    frame_bytes = 4 * getattr(model.config, "ch", 128) * height * width
    frames = min(_MOST_FRAMES_PER_CHUNK, _FEATURE_MAP_BYTES // frame_bytes)
    return max(1, frames // factor) * factor


@dataclass
class _Sums:
    """Sums over the frames seen so far."""

    frames: int = 0
    psnr: float = 0.0
    ssim: float = 0.0
    latent_values: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class _Reconstruction:
    """One video on its way through one model."""

    model: Any
    info: VideoInfo
    writer: VideoWriter
    side_by_side: bool
    chunk_frames: int
    slices: int | None
    sums: _Sums = field(default_factory=_Sums)

    def process(self, reader: VideoReader, max_frames: int | None, progress: Progress) -> None:
        """Returns None after all frames have been written and measured."""
        from vtok_ext.metrics import CodebookCounter

        is_discrete = self.model.is_discrete
        self.usage = CodebookCounter(self.model.codebook_size) if is_discrete else None
        if not self.model.is_causal:
            self._process_whole(reader, max_frames, progress)
            return
        encoder = self.model.stream_encoder(output="tokens" if is_discrete else "latent")
        decoder = self.model.stream_decoder(size=(self.info.height, self.info.width))
        # Decoded frames come later than their sources: a decoder holds back what the end may crop.
        self._sources: deque[tuple[torch.Tensor, list[int]]] = deque()
        device = next(self.model.parameters()).device
        for frames, timestamps in self._chunks(reader, max_frames):
            self._sources.append((frames, timestamps))
            start = time.monotonic()
            latents = encoder.push(frames[None].to(device))
            decoded = [part for latent in latents for part in decoder.push(latent)]
            self._take(latents, decoded, start)
            progress.update(self.sums.frames, self._note())
        start = time.monotonic()
        latents = encoder.flush()
        decoded = [part for latent in latents for part in decoder.push(latent)]
        decoded += decoder.flush(num_frames=encoder.num_frames)
        self._take(latents, decoded, start)
        progress.update(self.sums.frames, self._note())

    @torch.no_grad()
    def _process_whole(
        self, reader: VideoReader, max_frames: int | None, progress: Progress
    ) -> None:
        """Returns None after one pass over all frames together: no exact stream exists."""
        self._sources = deque()

        def frames() -> Iterator[torch.Tensor]:
            for part in self._chunks(reader, max_frames):
                self._sources.append(part)
                yield part[0]

        device = next(self.model.parameters()).device
        clip = read_whole("reconstruct", self.model, frames())[None].to(device)
        start = time.monotonic()
        encoding = self.model.encode(clip, fps=float(self.info.fps or 24))
        options = {} if self.slices is None else {"num_slices": self.slices}
        decoded = self.model.decode(encoding, **options)
        latent = encoding.indices if self.model.is_discrete else encoding.latent
        planes = list(latent.values()) if isinstance(latent, dict) else [latent]
        self._take(planes, [decoded], start)
        progress.update(self.sums.frames, self._note())

    def _chunks(
        self, reader: VideoReader, max_frames: int | None
    ) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """Yields ([3, t, H, W] uint8, timestamps) up to max_frames in all."""
        left = math.inf if max_frames is None else max_frames
        for chunk in reader.chunks(self.chunk_frames):
            count = int(min(left, len(chunk.timestamps)))
            yield chunk.frames[:, :count], chunk.timestamps[:count]
            left -= count
            if left <= 0:
                return

    def _take(self, latents: list[torch.Tensor], decoded: list[torch.Tensor], start: float) -> None:
        """Returns None after counting latents, and measuring and writing decoded frames."""
        decoded = [part.float().cpu() for part in decoded]
        self.sums.seconds += time.monotonic() - start
        for latent in latents:
            self.sums.latent_values += latent.numel()
            if self.usage is not None:
                self.usage.update(latent)
                self.sums.tokens += latent.numel()
        for part in decoded:
            self._measure_and_write(part)

    def _measure_and_write(
        self,
        decoded: torch.Tensor,  # [1, 3, t, H, W]
    ) -> None:
        from vtok_ext.metrics import psnr, ssim

        if not decoded.isfinite().all():
            raise ValueError(
                f"reconstruct: the model must give finite frames, got NaN or infinity after "
                f"{self.sums.frames} frames"
            )
        source, timestamps = self._sources_of(decoded.shape[2])
        target = source[None].float() / 127.5 - 1
        self.sums.psnr += psnr(decoded, target, per_frame=True).sum().item()
        if self._measures_ssim():
            self.sums.ssim += ssim(decoded, target, per_frame=True).sum().item()
        self.sums.frames += len(timestamps)
        picture = ((decoded[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        if self.side_by_side:
            picture = torch.cat([source, picture], dim=3)
        self.writer.write(picture, timestamps)

    def _sources_of(self, count: int) -> tuple[torch.Tensor, list[int]]:
        """Returns the next `count` source frames and timestamps, and forgets them."""
        frames, timestamps = self._sources.popleft()
        while len(timestamps) < count:
            more_frames, more_timestamps = self._sources.popleft()
            frames = torch.cat([frames, more_frames], dim=1)
            timestamps = timestamps + more_timestamps
        if len(timestamps) > count:
            self._sources.appendleft((frames[:, count:], timestamps[count:]))
        return frames[:, :count], timestamps[:count]

    def _measures_ssim(self) -> bool:
        return min(self.info.height, self.info.width) >= 11  # its window

    def _note(self) -> str:
        sums = self.sums
        if not sums.frames:
            return ""
        return f"{sums.psnr / sums.frames:.2f} dB, {sums.frames / sums.seconds:.1f} frames/s"

    def report(self, video: Path, output: Path, is_random: bool, device: str) -> dict[str, Any]:
        """Returns all results as plain values."""
        sums, info = self.sums, self.info
        pixels = sums.frames * info.height * info.width
        report: dict[str, Any] = {
            "video": str(video),
            "output": str(output),
            "model": self.model.name,
            "random_weights": is_random,
            "device": device,
            "frames": sums.frames,
            "height": info.height,
            "width": info.width,
            "psnr": round(sums.psnr / sums.frames, 3),
            "ssim": round(sums.ssim / sums.frames, 4) if self._measures_ssim() else None,
            "seconds": round(sums.seconds, 3),
            "frames_per_second": round(sums.frames / sums.seconds, 3),
        }
        if self.usage is None:
            report["latent_values"] = sums.latent_values
            report["latent_values_per_pixel"] = round(sums.latent_values / pixels, 6)
            return report
        usage = self.usage.result()
        bits = sums.tokens * math.log2(self.model.codebook_size)
        report["tokens"] = sums.tokens
        report["bits_per_pixel"] = round(bits / pixels, 6)
        report["compression_ratio"] = round(24 * pixels / bits, 1)
        report["codebook_usage"] = {
            "codebook_size": self.model.codebook_size,
            "num_used": usage.num_used,
            "fraction_used": usage.fraction_used,
            "perplexity": round(usage.perplexity, 2),
        }
        return report


def _summary(report: dict[str, Any]) -> list[str]:
    ssim = "n/a" if report["ssim"] is None else f"{report['ssim']:.4f}"
    if "tokens" in report:
        usage = report["codebook_usage"]
        size = (
            f"{report['tokens']} tokens, {report['bits_per_pixel']:.4f} bits per pixel, "
            f"{report['compression_ratio']:.0f} times smaller than raw; {usage['num_used']} "
            f"distinct codes, perplexity {usage['perplexity']:.0f}"
        )
    else:
        size = (
            f"{report['latent_values']} latent values, "
            f"{report['latent_values_per_pixel']:.4f} per pixel"
        )
    return [
        f"PSNR {report['psnr']:.2f} dB, SSIM {ssim}",
        size,
        f"{report['frames']} frames of {report['width']}x{report['height']} in "
        f"{report['seconds']:.1f} s, {report['frames_per_second']:.2f} frames/s on "
        f"{report['device']}",
        f"wrote {report['output']}",
    ]
