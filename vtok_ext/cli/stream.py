"""`vtok stream`: file to file in constant memory, whatever the two files are.

video -> tokens or latents    vtok encode, resumable
tokens or latents -> video    vtok decode
video -> video                vtok reconstruct
"""

from __future__ import annotations

from pathlib import Path

from .memory_plan import NO_LIMIT, MemoryOptions
from .streaming_mode import check_streaming
from .video_suffixes import OTHER_VIDEO_SUFFIXES, VIDEO_SUFFIXES


def direction_of(source: Path, out: Path) -> str:
    """Returns "encode", "decode" or "reconstruct".

    Raises:
        FileNotFoundError: there is no file `source`.
        ValueError: both are token or latent files, or `out` a video of a kind that is not written.
    """
    from vtok_ext.models.encoding_stream import encoding_kind

    to_video = out.suffix.lower() in VIDEO_SUFFIXES
    try:
        encoding_kind(source)
    except ValueError:
        if out.suffix.lower() in OTHER_VIDEO_SUFFIXES:
            raise ValueError(
                f"stream: output must end in {', '.join(VIDEO_SUFFIXES)} to be a video, or in no "
                f"suffix of videos to be a token or latent file, got {out}"
            ) from None
        return "reconstruct" if to_video else "encode"
    if not to_video:
        raise ValueError(
            f"stream: output must end in {', '.join(VIDEO_SUFFIXES)} where the input is a token or "
            f"latent file, got {out}"
        )
    return "decode"


def run_stream(
    *,
    source: Path,
    out: Path,
    model: str,
    name: str | None,
    ema: bool,
    trust_checkpoint: bool,
    output: str | None,
    streaming: str | None,
    resume: bool,
    save_every_s: float,
    any_weights: bool,
    device: str,
    as_json: bool,
    memory: MemoryOptions = NO_LIMIT,
) -> None:
    """Returns None after doing what the two files call for.

    Args:
        streaming: "exact" or "reference"; None for what a token or latent file was made with, and
            for "exact" from a video.
        save_every_s: seconds between saved states with `resume`.
        output, resume, any_weights, ...: as in the options of the same names.

    Raises:
        ValueError: an option that is wrong, or that the two files leave no use for.
    """
    if streaming is not None:
        check_streaming("stream", streaming)
    if not save_every_s >= 0:
        raise ValueError(f"stream: --save-every must be at least 0, got {save_every_s}")
    direction = direction_of(source, out)
    if direction == "encode":
        from .encode import EncodeOptions, run_encode

        options = EncodeOptions(
            source=source,
            out=out,
            model=model,
            name=name,
            ema=ema,
            trust_checkpoint=trust_checkpoint,
            device=device,
            output=output,
            streaming=streaming or "exact",
            resume=resume,
            save_every_s=save_every_s,
            memory=memory,
        )
        run_encode(options, as_json=as_json)
        return
    if resume:
        raise ValueError(
            f"stream: --resume must come with a token or latent file as output, got {out}; video "
            "containers cannot be continued"
        )
    if output is not None:
        raise ValueError(
            f"stream: --output must come with a token or latent file as output, got {output} and "
            f"the video {out}"
        )
    if direction == "decode":
        from .decode import run_decode

        run_decode(
            source=source,
            out=out,
            model_source=model,
            name=name,
            ema=ema,
            trust_checkpoint=trust_checkpoint,
            device=device,
            any_weights=any_weights,
            streaming=streaming,
            as_json=as_json,
            memory=memory,
        )
        return
    if streaming == "reference":
        # How many frames the published chunks add to the front is known at the end only.
        raise ValueError(
            f"stream: --streaming reference must have a token or latent file on one side, got the "
            f"videos {source} and {out}; encode to a file, then decode that"
        )
    from .reconstruct import run_reconstruct

    run_reconstruct(
        video=source,
        model_source=model,
        output=out,
        name=name,
        side_by_side=False,
        max_frames=None,
        device=device,
        as_json=as_json,
        ema=ema,
        trust_checkpoint=trust_checkpoint,
        memory=memory,
    )
