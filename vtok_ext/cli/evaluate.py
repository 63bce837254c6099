"""`vtok eval`: PSNR, SSIM, use of the codebook and seams of a model on videos.

    default    exact stream over the whole video, posterior mode, every frame; mean over videos; a
               CoordTok takes windows of its own length one after the other, the last one shorter
    reference  as the published evaluation: every round(fps / 30)-th frame, not rounded to bytes
               after --size; posterior samples; 1.1 on the longest 1 + 16 k frames in overlapping
               chunks of 16, other versions on clips of 17 frames (16 without causality), the last
               one completed by its last frame; mean over clips

Quality is a mean over frames either way, so that grouping them by 16, as the published script does,
changes memory only; psnr_video is CoordTok's instead, of the squared error of a whole video. Source
of the second: scripts/inference_evaluate.py of microsoft/VidTok. Seams are looked for at the
borders of a CoordTok's windows, and behind frame 1 + 16 k of causal models; where a clip is coded
whole there are none. Intervals of means: see `eval_means`. LPIPS, FVD and KVD come on request, see
`eval_measures`.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtok_ext.data.video import VideoReader
from vtok_ext.metrics import CodebookCounter, lpips, psnr, sobel_frequency, ssim, video_dynamics
from vtok_ext.models._video_input import to_float
from vtok_ext.models.coordtok import CoordTok

from .console import Console
from .eval_frames import PUBLISHED_FPS, frames_of, interval_of, size_of, video_files
from .eval_means import line_of_spread, means_of, spread_of
from .eval_measures import MeasureOptions, Shared, lines_of_sets
from .freed_memory import keep_freed_memory
from .model_source import load_model_for, resolve_device
from .reconstruct import frames_per_chunk

PROTOCOLS = ("default", "reference")
CHUNK_FRAMES = 16
# First frames of the chunks of a causal model behind its first frame, and of what has no chunks.
_CAUSAL_BORDERS, _NO_BORDERS = range(1, sys.maxsize, CHUNK_FRAMES), range(0)
_SSIM_WINDOW, _SOBEL_WINDOW, _LPIPS_SIZE = 11, 3, 16
# Values of a video, and how many digits of them are reported.
_DIGITS = {
    "psnr": 3,
    "psnr_video": 3,
    "ssim": 4,
    "lpips": 4,
    "boundary_jump": 4,
    "dynamics": 6,
    "frequency": 4,
}


@dataclass(frozen=True)
class EvalOptions:
    """What `vtok eval` is asked for; see its options."""

    videos: list[Path]
    model: str
    name: str | None = None
    ema: bool = False
    trust_checkpoint: bool = False
    protocol: str = "default"
    size: int | None = None
    max_frames: int | None = None
    seed: int = 42
    slices: int | None = None
    device: str = "auto"
    measures: MeasureOptions = MeasureOptions()


def run_eval(options: EvalOptions, *, as_json: bool) -> None:
    """Returns None after printing the quality of each video and of all."""
    console = Console(as_json)
    if options.protocol not in PROTOCOLS:
        raise ValueError(
            f"eval: --protocol must be one of {', '.join(PROTOCOLS)}, got {options.protocol}"
        )
    paths = video_files(options.videos)
    target = resolve_device(options.device)
    keep_freed_memory()
    model, is_random = load_model_for(
        options.model,
        options.name,
        target,
        console,
        ema=options.ema,
        trust_checkpoint=options.trust_checkpoint,
    )
    if options.slices is not None and not isinstance(model, CoordTok):
        raise ValueError(f"eval: --slices must be given for a CoordTok, got {model.name}")
    shared = Shared(model.codebook_size, options.measures, target)
    generator = torch.Generator().manual_seed(options.seed)
    start, rows = time.monotonic(), []
    results: list[list[dict[str, Any]]] = []  # by video, then by clip
    with console.progress("evaluating", len(paths)) as progress:
        for path in paths:
            scores, interval = _evaluated(path, options, model, shared, generator)
            shared.sets.end_video()
            if not scores:
                console.warn(f"{path} is too short for this protocol and was left out")
            else:
                results.append([score.result() for score in scores])
                rows.append({"video": str(path), "interval": interval, **_mean(results[-1])})
            progress.update(len(rows))
    if not results:
        raise ValueError("eval: some video must be long enough, got none")
    report = {
        "model": model.name,
        "model_id": model.model_id,
        "version": model.reference_version,
        "random_weights": is_random,
        "device": str(target),
        **_protocol_facts(options, model),
        "size": options.size,
        **_mean([result for of_video in results for result in of_video]),
        **spread_of(results, _DIGITS),
        "codebook_usage": _usage(shared.usage),
        **shared.sets.result(),
        "videos": rows,
        "seconds": round(time.monotonic() - start, 3),
    }
    console.result(report, _lines(report))


def _protocol_facts(options: EvalOptions, model: Any) -> dict[str, Any]:
    """Returns what the numbers mean."""
    if options.protocol == "default":
        passes = "exact stream" if model.is_causal else "whole clip"
        if isinstance(model, CoordTok):
            passes = f"windows of {model.config.video_shape[0]} frames"
            passes += "" if options.slices is None else f", decoded in {options.slices} slices"
        latents = "codes" if model.is_discrete else "mode"
        facts: dict[str, Any] = {"latents": latents, "frame_rule": "preserve", "passes": passes}
        facts |= {"sample_fps": None, "averaged_over": "videos", "seed": None}
        return {"protocol": "default", **facts}
    passes = f"clips of {_clip_frames(model)} frames"
    if _is_chunked(model):
        passes = f"overlapping chunks of {CHUNK_FRAMES} frames"
    latents = "codes" if model.is_discrete else "sample"
    facts = {"latents": latents, "frame_rule": "reference", "passes": passes}
    facts |= {"sample_fps": PUBLISHED_FPS, "averaged_over": "clips", "seed": options.seed}
    return {"protocol": "reference", **facts}


@dataclass
class _Scores:
    """Sums over the frames of one video or clip; frames may come in any portions.

    Attributes:
        borders: first frames of what was coded by itself, but the first.
        error: squared, with the constant that keeps PSNR finite.
    """

    shared: Shared
    borders: range = _NO_BORDERS
    frames: int = 0
    psnr: float = 0.0
    error: float = 0.0
    ssim: float | None = 0.0
    lpips: float | None = 0.0
    frequency: float | None = 0.0
    dynamics: float = 0.0
    changes: list[float] = field(default_factory=list)  # of the error, from frame to frame
    last: Tensor | None = None
    last_source: Tensor | None = None

    def add(self, decoded: Tensor, source: Tensor) -> None:
        """Returns None after measuring decoded [1, 3, t, H, W] against the source, both of them
        float in [-1, 1] or uint8."""
        decoded, target = decoded.float().cpu(), to_float(source, torch.float32)
        if not decoded.isfinite().all():
            raise ValueError(
                f"eval: the model must give finite frames, got NaN or infinity after "
                f"{self.frames} frames"
            )
        self._add_content(decoded, source)
        self.frames += target.shape[2]
        by_frame = psnr(decoded, target, per_frame=True).double()
        self.psnr += by_frame.sum().item()
        self.error += (10 ** (-by_frame / 10)).sum().item()
        if min(target.shape[3:]) < _SSIM_WINDOW:
            self.ssim = None
        elif self.ssim is not None:
            self.ssim += ssim(decoded, target, per_frame=True).sum().item()
        for error in (decoded - target).unbind(2):
            if self.last is not None:
                self.changes.append((error - self.last).abs().mean().item())
            self.last = error

    def _add_content(self, decoded: Tensor, source: Tensor) -> None:
        """Adds what is measured of the source alone, and what is measured on request."""
        if min(source.shape[3:]) < _SOBEL_WINDOW:
            self.frequency = None
        elif self.frequency is not None:
            self.frequency += sobel_frequency(source).item() * source.shape[2]
        before = source if self.last_source is None else torch.cat([self.last_source, source], 2)
        if before.shape[2] > 1:
            self.dynamics += video_dynamics(before).item() * (before.shape[2] - 1)
        self.last_source = source[:, :, -1:]
        network = self.shared.lpips
        if network is None or min(source.shape[3:]) < _LPIPS_SIZE:
            self.lpips = None
        elif self.lpips is not None:
            target = to_float(source, torch.float32)
            self.lpips += lpips(decoded, target, network=network, per_frame=True).sum().item()
        self.shared.sets.add("generated", decoded)
        self.shared.sets.add("real", source)

    def result(self) -> dict[str, Any]:
        """Returns means over frames, and the jump at borders where there are some."""
        border = [c for t, c in enumerate(self.changes, 1) if t in self.borders]
        inside = [c for t, c in enumerate(self.changes, 1) if t not in self.borders]
        jump = None
        if border and inside and sum(inside) > 0:
            jump = (sum(border) / len(border)) / (sum(inside) / len(inside))
        return {
            "frames": self.frames,
            "psnr": self.psnr / self.frames,
            "psnr_video": -10 * math.log10(self.error / self.frames),
            "ssim": None if self.ssim is None else self.ssim / self.frames,
            "lpips": None if self.lpips is None else self.lpips / self.frames,
            "boundary_jump": jump,
            "dynamics": self.dynamics / (self.frames - 1) if self.frames > 1 else None,
            "frequency": None if self.frequency is None else self.frequency / self.frames,
        }


def _mean(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the mean of each value over those that have one, and all frames."""
    return {"frames": sum(result["frames"] for result in results), **means_of(results, _DIGITS)}


@torch.no_grad()
def _evaluated(
    path: Path, options: EvalOptions, model: Any, shared: Shared, generator: torch.Generator
) -> tuple[list[_Scores], int]:
    """Returns the scores of a video, one or in the reference protocol one per clip, and its
    interval: that of the frames which are looked at."""
    with VideoReader(path) as reader:
        if options.protocol == "default" and model.is_causal:
            return [_streamed(reader, options, model, shared)], 1
        video = torch.cat(list(frames_of(reader, options, 64)), dim=2)
        fps = float(reader.info.fps) or None
        interval = interval_of(reader.info, options)
    if options.protocol == "default":
        return [_whole(path, video, fps, model, shared, options.slices)], interval
    return _published_clips(path, video, model, shared, generator), interval


def _published_clips(
    path: Path, video: Tensor, model: Any, shared: Shared, generator: torch.Generator
) -> list[_Scores]:
    """Returns the scores of the clips of a video [1, 3, T, H, W] in the reference protocol."""
    s = model.spatial_factor
    if s is None:
        raise ValueError(f"eval: --protocol reference must be given a VidTok, got {model.name}")
    video = video[..., : video.shape[3] // s * s, : video.shape[4] // s * s]
    if min(video.shape[3:]) < s:
        raise ValueError(f"eval: {path} must be at least {s}x{s}, got {list(video.shape[3:])}")
    if _is_chunked(model):
        return _published(video, model, shared, generator)
    scores = []
    for clip in video.split(_clip_frames(model), dim=2):
        missing = _clip_frames(model) - clip.shape[2]
        clip = torch.cat([clip, clip[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        encoding = model.encode(
            clip.to(_device(model)), frames="reference", sample=True, generator=generator
        )
        scores.append(_scores_of(encoding, clip, model, shared))
    return scores


def _whole(
    path: Path,
    video: Tensor,
    fps: float | None,
    model: Any,
    shared: Shared,
    slices: int | None,  # of a CoordTok's decoder
) -> _Scores:
    """Returns the scores of a video encoded at once, by a CoordTok in windows of its length."""
    length = video.shape[2]
    in_slices = {} if slices is None else {"num_slices": slices}
    if isinstance(model, CoordTok):
        length, *limit = model.config.video_shape
        if any(size > most for size, most in zip(video.shape[3:], limit, strict=True)):
            raise ValueError(
                f"eval: {path} must be at most {limit[0]}x{limit[1]} for {model.name}, got "
                f"{list(video.shape[3:])}; --size scales and crops it"
            )
    scores = _Scores(shared, range(length, video.shape[2], length))
    for part in video.split(length, dim=2):
        encoding = model.encode(part.to(_device(model)), fps=fps)
        shared.count(encoding.indices)
        scores.add(model.decode(encoding, **in_slices), part)
    return scores


def _streamed(reader: VideoReader, options: EvalOptions, model: Any, shared: Shared) -> _Scores:
    """Returns the scores of an exact stream; holds only frames that wait to be decoded."""
    scores, waiting, device = _Scores(shared, _CAUSAL_BORDERS), None, _device(model)
    encoder = model.stream_encoder("tokens" if model.is_discrete else "latent")
    size = size_of(reader, options)
    decoder = model.stream_decoder(size=size)

    def compare(latents: list[Tensor], end: bool) -> None:
        nonlocal waiting
        decoded = []
        for latent in latents:
            shared.count(latent if model.is_discrete else None)
            decoded += decoder.push(latent)
        if end:
            decoded += decoder.flush(num_frames=encoder.num_frames)
        for frames in decoded:
            count = frames.shape[2]
            scores.add(frames, waiting[:, :, :count])  # type: ignore[index]
            waiting = waiting[:, :, count:]  # type: ignore[index]

    for frames in frames_of(reader, options, frames_per_chunk(model, *size)):
        waiting = frames if waiting is None else torch.cat([waiting, frames], dim=2)
        compare(encoder.push(frames.to(device)), end=False)
    compare(encoder.flush(), end=True)
    return scores


def _published(
    video: Tensor, model: Any, shared: Shared, generator: torch.Generator
) -> list[_Scores]:
    """Returns the scores of a video in the published chunks of 1.1; none if it is too short."""
    from vtok_ext.models.vidtok_published import decode_published, encode_published

    if video.shape[2] <= CHUNK_FRAMES:
        return []
    video = video[:, :, : 1 + (video.shape[2] - 1) // CHUNK_FRAMES * CHUNK_FRAMES]
    encoding = encode_published(model, video.to(_device(model)), sample=True, generator=generator)
    shared.count(encoding.indices)
    scores = _Scores(shared, _CAUSAL_BORDERS)
    scores.add(decode_published(model, encoding), video)
    return [scores]


def _scores_of(encoding: Any, source: Tensor, model: Any, shared: Shared) -> _Scores:
    shared.count(encoding.indices)
    scores = _Scores(shared)
    decoded = model.decode(encoding)
    # The published rule loses frames of lengths that it does not fit.
    scores.add(decoded, source[:, :, : decoded.shape[2]])
    return scores


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def _is_chunked(model: Any) -> bool:
    return model.reference_version == "1.1"


def _clip_frames(model: Any) -> int:
    return CHUNK_FRAMES + int(getattr(model, "starts_alone", model.is_causal))


def _usage(usage: CodebookCounter | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    found = usage.result()
    return {
        "codebook_size": usage.codebook_size,
        "num_tokens": found.num_tokens,
        "num_used": found.num_used,
        "fraction_used": found.fraction_used,
        "perplexity": round(found.perplexity, 2),
    }


def _lines(report: dict[str, Any]) -> list[str]:
    def line(title: str, row: dict[str, Any]) -> str:
        ssim_text = "n/a" if row["ssim"] is None else f"{row['ssim']:.4f}"
        jump = "n/a" if row["boundary_jump"] is None else f"{row['boundary_jump']:.3f}"
        perceptual = "" if row["lpips"] is None else f"LPIPS {row['lpips']:.4f}, "
        return (
            f"{title}: PSNR {row['psnr']:.2f} dB, SSIM {ssim_text}, {perceptual}"
            f"boundary jump {jump}, {row['frames']} frames"
        )

    lines = [line(row["video"], row) for row in report["videos"]]
    lines.append(line(f"mean over {report['averaged_over']}", report))
    lines.append(line_of_spread(report))
    lines += lines_of_sets({name: report[name] for name in ("fvd", "kvd") if name in report})
    if report["codebook_usage"] is not None:
        usage = report["codebook_usage"]
        lines.append(
            f"{usage['num_used']} of {usage['codebook_size']:,} codes used, perplexity "
            f"{usage['perplexity']:.0f}"
        )
    rate = report["sample_fps"]
    at = "" if rate is None else f", every round(fps / {rate})-th frame"
    lines.append(
        f"protocol {report['protocol']}: {report['latents']}, {report['passes']}, frames "
        f"{report['frame_rule']}{at}"
    )
    return lines
