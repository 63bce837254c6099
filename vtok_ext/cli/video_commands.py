"""Commands of `vtok` on videos and models; each imports its own implementation when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .memory_plan import MemoryOptions
from .options import (
    AnyWeightsOption,
    DeviceOption,
    EmaOption,
    JsonOption,
    MemoryOption,
    ModelOption,
    NameOption,
    OutputOption,
    OverrideOption,
    SlicesOption,
    StatisticsOption,
    StatisticsOrderOption,
    StreamingOption,
    TileOption,
    TrustOption,
    parsed_overrides,
    refuse_options,
)


def demo(
    video: Annotated[
        Path | None, typer.Option(help="Train on this clip instead of a procedural one.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("vtok-demo"),
    seconds: Annotated[
        float | None, typer.Option(help="Training time to aim at, on the wall clock.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps, exactly; instead of --seconds.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the clip, the weights and the training.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Train a small tokenizer on one clip, then encode it to a token file and decode that."""
    from .demo import run_demo

    run_demo(video=video, out=out, seconds=seconds, steps=steps, seed=seed, as_json=as_json)


def reconstruct(
    video: Annotated[
        Path, typer.Argument(help="Video file, of any length and size that the model takes.")
    ],
    model: ModelOption,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Video to write [default: NAME.vtok.mp4 here]."),
    ] = None,
    name: NameOption = None,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side/--no-side-by-side", help="Input left, output right.")
    ] = False,
    max_frames: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many frames.")
    ] = None,
    ema: EmaOption = False,
    trust_checkpoint: TrustOption = False,
    slices: SlicesOption = None,
    tile: TileOption = None,
    memory: MemoryOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Encode a video and decode it again; print the quality.

    Frame by frame with a causal model; others take the whole video, which --max-frames bounds.
    """
    from .reconstruct import run_reconstruct

    run_reconstruct(
        video=video,
        model_source=model,
        output=output,
        name=name,
        side_by_side=side_by_side,
        max_frames=max_frames,
        ema=ema,
        trust_checkpoint=trust_checkpoint,
        slices=slices,
        memory=MemoryOptions(tile, memory),
        device=device,
        as_json=as_json,
    )


def encode(
    video: Annotated[
        Path, typer.Argument(help="Video file, of any length and size that the model takes.")
    ],
    out: Annotated[Path, typer.Argument(help="Token or latent file to write (safetensors).")],
    model: ModelOption,
    name: NameOption = None,
    ema: EmaOption = False,
    trust_checkpoint: TrustOption = False,
    output: OutputOption = None,
    streaming: StreamingOption = "exact",
    frames: Annotated[
        str,
        typer.Option(
            help="preserve keeps every length; reference follows the published frame rule, with "
            "the whole clip in memory."
        ),
    ] = "preserve",
    tile: TileOption = None,
    memory: MemoryOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Encode a video to a token or latent file.

    In constant memory with a causal model; others take the whole video.
    """
    from .encode import EncodeOptions, run_encode

    options = EncodeOptions(
        source=video,
        out=out,
        model=model,
        name=name,
        ema=ema,
        trust_checkpoint=trust_checkpoint,
        memory=MemoryOptions(tile, memory),
        device=device,
        output=output,
        streaming=streaming,
        frames=frames,
    )
    run_encode(options, as_json=as_json)


def decode(
    source: Annotated[Path, typer.Argument(help="Token or latent file.")],
    out: Annotated[Path, typer.Argument(help="Video to write.")],
    model: ModelOption,
    name: NameOption = None,
    ema: EmaOption = False,
    trust_checkpoint: TrustOption = False,
    any_weights: AnyWeightsOption = False,
    slices: SlicesOption = None,
    tile: TileOption = None,
    memory: MemoryOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Decode a token or latent file to a video.

    In constant memory with a causal model; others take the whole video.
    """
    from .decode import run_decode

    run_decode(
        source=source,
        out=out,
        model_source=model,
        name=name,
        ema=ema,
        trust_checkpoint=trust_checkpoint,
        slices=slices,
        memory=MemoryOptions(tile, memory),
        device=device,
        any_weights=any_weights,
        as_json=as_json,
    )


def stream(
    source: Annotated[Path, typer.Argument(help="Video, or token or latent file.")],
    out: Annotated[Path, typer.Argument(help="Token or latent file, or video, to write.")],
    model: ModelOption,
    name: NameOption = None,
    ema: EmaOption = False,
    trust_checkpoint: TrustOption = False,
    output: OutputOption = None,
    streaming: Annotated[
        str | None,
        typer.Option(
            help="exact, or reference for the published chunks of VidTok 1.1 [default: exact; from "
            "a token or latent file, as that was encoded]."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue what an interrupted call left in OUT.partial and OUT.state, and leave "
            "it if interrupted. Encoding only.",
        ),
    ] = False,
    save_every: Annotated[
        float, typer.Option(help="Seconds between saved states with --resume.")
    ] = 60.0,
    any_weights: AnyWeightsOption = False,
    tile: TileOption = None,
    memory: MemoryOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Encode, decode or reconstruct, file to file; encoding can be resumed.

    In constant memory with a causal model; others take the whole video.
    """
    from .stream import run_stream

    run_stream(
        source=source,
        out=out,
        model=model,
        name=name,
        ema=ema,
        trust_checkpoint=trust_checkpoint,
        output=output,
        streaming=streaming,
        resume=resume,
        save_every_s=save_every,
        any_weights=any_weights,
        memory=MemoryOptions(tile, memory),
        device=device,
        as_json=as_json,
    )


def convert(
    source: Annotated[
        str, typer.Argument(help="Folder of a saved model, of diffusers, or a released checkpoint.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="vtok, or diffusers for its AutoencoderVidTok.")] = "vtok",
    name: NameOption = None,
    override: OverrideOption = None,
    ema: EmaOption = False,
    statistics: StatisticsOption = None,
    statistics_order: StatisticsOrderOption = None,
    trust_checkpoint: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a model between released checkpoints, this package and diffusers."""
    from .convert import run_convert

    run_convert(
        source=source,
        out=out,
        to=to,
        name=name,
        overrides=parsed_overrides("convert", override or []),
        ema=ema,
        statistics=statistics,
        statistics_order=statistics_order,
        trust_checkpoint=trust_checkpoint,
        as_json=as_json,
    )


def evaluate(
    videos: Annotated[list[Path], typer.Argument(help="Videos, or folders of videos.")],
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a saved model, a released checkpoint, or a preset name."),
    ] = None,
    generated: Annotated[
        list[Path] | None,
        typer.Option(help="Instead of a model: generated videos, or a folder, to compare."),
    ] = None,
    name: NameOption = None,
    ema: EmaOption = False,
    trust_checkpoint: TrustOption = False,
    protocol: Annotated[
        str, typer.Option(help="default, or reference for that of the published evaluation.")
    ] = "default",
    size: Annotated[
        int | None,
        typer.Option(min=8, help="Scale the shorter side to this and crop the centre square."),
    ] = None,
    max_frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of each video to look at.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of sampled latents (reference) [default: 42].")
    ] = None,
    lpips: Annotated[bool, typer.Option("--lpips", help="LPIPS too.")] = False,
    lpips_backbone: Annotated[
        Path | None, typer.Option(help="VGG16 of torchvision [default: torch's cache].")
    ] = None,
    lpips_heads: Annotated[
        Path | None, typer.Option(help="vgg.pth of LPIPS [default: torch's cache].")
    ] = None,
    fvd_weights: Annotated[
        Path | None, typer.Option(help="i3d_pretrained_400.pt: FVD of clips of 16 frames too.")
    ] = None,
    kvd: Annotated[bool, typer.Option("--kvd", help="KVD of clips of 16 frames too.")] = False,
    chunks: Annotated[
        str | None,
        typer.Option(help="FVD, KVD: all clips of a video, or the first one [default: all]."),
    ] = None,
    slices: SlicesOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure a model on videos, or generated videos against real ones.

    PSNR, SSIM, use of the codebook, visibility of chunk borders; on request LPIPS, FVD, KVD; with
    --generated or --json also dynamics and detail of the videos.
    """
    from .eval_measures import MeasureOptions
    from .evaluate import EvalOptions, run_eval

    if (model is None) == (generated is None):
        raise ValueError(
            f"eval: one of --model and --generated must be given, got "
            f"{'neither' if model is None else 'both'}"
        )
    if generated is not None:
        refuse_options(
            "eval",
            "with --generated, which runs no model",
            {
                "--lpips": lpips,
                "--protocol": protocol != "default",
                "--name": name,
                "--ema": ema,
                "--seed": seed,
                "--slices": slices,
            },
        )
    elif protocol == "default":
        refuse_options("eval", "without --protocol reference", {"--seed": seed})
    if not lpips:
        files = {"--lpips-backbone": lpips_backbone, "--lpips-heads": lpips_heads}
        refuse_options("eval", "without --lpips", files)
    if fvd_weights is None and not kvd:
        refuse_options("eval", "without --fvd-weights or --kvd", {"--chunks": chunks})
    measures = MeasureOptions(
        lpips, lpips_backbone, lpips_heads, fvd_weights, kvd, chunks or "all", trust_checkpoint
    )
    options = EvalOptions(
        videos=videos,
        model=model or "",
        name=name,
        ema=ema,
        trust_checkpoint=trust_checkpoint,
        protocol=protocol,
        size=size,
        max_frames=max_frames,
        seed=42 if seed is None else seed,
        slices=slices,
        device=device,
        measures=measures,
    )
    if generated is not None:
        from .evaluate_generated import run_eval_generated

        run_eval_generated(options, generated, as_json=as_json)
        return
    run_eval(options, as_json=as_json)


def models(as_json: JsonOption = False) -> None:
    """List the models that can be created by name."""
    from .models import run_models

    run_models(as_json=as_json)


def doctor(as_json: JsonOption = False) -> None:
    """Show what this installation can use, and why something cannot be used."""
    from .doctor import run_doctor

    run_doctor(as_json=as_json)
