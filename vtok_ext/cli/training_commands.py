"""Commands of `vtok` that train, measure and generate; each imports its own implementation when it
runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vtok_ext.models.failed_computation import FailedComputationError

from .failures import Interrupted
from .options import (
    AnyWeightsOption,
    DeviceOption,
    EmaOption,
    JsonOption,
    ModelOption,
    NameOption,
    OutputOption,
    OverrideOption,
    StatisticsOption,
    StatisticsOrderOption,
    TrustOption,
    parsed_overrides,
    refuse_options,
)

# A number per video is added to it, and the sum must be below 2^63.
_NUM_SEEDS = 1 << 62


def train(
    recipe: Annotated[str, typer.Argument(help="YAML file, or a built-in recipe: smoke_fsq, ...")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Single values, such as run.steps=100.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the run: log, checkpoints, model.")
    ] = Path("vtok-run"),
    resume: Annotated[
        str, typer.Option(help="auto continues the newest undamaged checkpoint; or never.")
    ] = "never",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show parameters, memory and the first batch; no training."),
    ] = False,
    overfit: Annotated[
        int | None,
        typer.Option(min=1, help="Learn four clips by heart in so many steps, and check it did."),
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train a tokenizer or generator by a recipe, also under torchrun. SIGTERM saves and stops."""
    from .train import run_train

    left = run_train(
        recipe=recipe,
        overrides=overrides or [],
        out=out,
        resume=resume,
        device=device,
        as_json=as_json,
        dry=dry_run,
        overfit=overfit,
    )
    if left is not None:
        raise Interrupted(left)


def max_batch(
    systems: Annotated[
        list[str] | None, typer.Argument(help="Models [default: of every architecture].")
    ] = None,
    frames: Annotated[
        list[int] | None, typer.Option(help="Clip lengths [default: 16, 32, 64, 128].")
    ] = None,
    size: Annotated[int, typer.Option(help="Height and width of the clips.")] = 128,
    memory: Annotated[float, typer.Option(help="Memory budget in GiB.")] = 24.0,
    precision: Annotated[
        str, typer.Option(help="float32, or bfloat16 or float16 for autocast.")
    ] = "bfloat16",
    recompute_encoder: Annotated[
        bool,
        typer.Option(
            "--recompute-encoder", help="CoordTok once more, recomputing its encoder backwards."
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Run steps on the GPU; how much more than predicted a clip takes."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Predict the largest training batch within a memory budget, by clip length."""
    from .max_batch import SYSTEMS, run_max_batch

    run_max_batch(
        systems=systems or list(SYSTEMS),
        lengths=frames or [16, 32, 64, 128],
        size=size,
        memory_gib=memory,
        precision=precision,
        recompute_encoder=recompute_encoder,
        check=check,
        as_json=as_json,
    )


def tokenize(
    source: Annotated[
        str,
        typer.Argument(help="Folder, .csv, .jsonl, .tar or video; or procedural:N for N clips."),
    ],
    out: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    model: ModelOption,
    name: NameOption = None,
    ema: EmaOption = False,
    trust_checkpoint: TrustOption = False,
    output: OutputOption = None,
    frames: Annotated[
        int | None,
        typer.Option(
            min=1, help="Cut videos into clips of so many frames [default: whole videos]."
        ),
    ] = None,
    max_clips: Annotated[int | None, typer.Option(min=1, help="Clips of a video at most.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frame rate [default: all frames].")] = None,
    size: Annotated[
        int | None, typer.Option(min=8, help="Scale and crop to a square of this size.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips encoded at once.")] = 8,
    videos_per_shard: Annotated[int, typer.Option(min=1, help="Videos in one file.")] = 64,
    dtype: Annotated[str, typer.Option(help="Of latents: float32, bfloat16, float16.")] = "float32",
    workers: Annotated[int, typer.Option(min=0, help="Processes that read videos.")] = 0,
    root: Annotated[
        Path | None, typer.Option(help="Where the paths of a .csv or .jsonl begin.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Make the shards that are missing.")
    ] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Turn a data set into shards of latents or tokens; the same under torchrun."""
    from .tokenize import TokenizeOptions, run_tokenize

    options = TokenizeOptions(
        source=source,
        out=out,
        model=model,
        name=name,
        ema=ema,
        trust_checkpoint=trust_checkpoint,
        output=output,
        frames=frames,
        max_clips=max_clips,
        fps=fps,
        size=size,
        batch_size=batch_size,
        videos_per_shard=videos_per_shard,
        dtype=dtype,
        workers=workers,
        root=root,
        resume=resume,
        device=device,
    )
    run_tokenize(options, as_json=as_json)


def stats(
    model: Annotated[str, typer.Argument(help="Folder of a saved model.")],
    data: Annotated[Path, typer.Argument(help="Folder that vtok tokenize wrote with it.")],
    max_items: Annotated[int | None, typer.Option(min=1, help="Latents to look at.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure mean and deviation of latents; `normalize=True` of encode and decode uses them."""
    from .stats import run_stats

    run_stats(model=model, data=data, max_items=max_items, as_json=as_json)


def study(
    name: Annotated[
        str | None, typer.Argument(help="Study of bench/studies, or a YAML file of your own.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Make what is missing; results that are there stay.")
    ] = False,
    rows: Annotated[str | None, typer.Option(help="Only these rows, separated by commas.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Only these seeds, such as 0,1.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the work.")] = 1,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Minutes instead of hours; the numbers mean nothing.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write the report of what is there.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for results and report.")
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="Show the studies there are.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run an experiment of rows and seeds; its report says which claims hold."""
    from .study import run_list, run_study_command

    if list_all:
        return run_list(as_json=as_json)
    if name is None:
        raise ValueError("study: NAME must be given, got none; --list shows the studies")
    failed = run_study_command(
        name=name,
        rows=rows,
        seeds=seeds,
        jobs=jobs,
        resume=resume,
        smoke=smoke,
        report_only=report_only,
        out=out,
        as_json=as_json,
    )
    if failed:
        raise FailedComputationError(
            f"study: every run must end, got {len(failed)} that failed, the first: {failed[0]}"
        )


def grow(
    model: Annotated[str, typer.Argument(help="Folder of a trained causal tokenizer.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Single values, such as run.steps=100.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="YAML file, or a built-in recipe, of task grow.")
    ] = "promag_grow",
    mixing: Annotated[
        str | None, typer.Option(help="per_position or global [default: the recipe's].")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the run: log, model, comparison.png.")
    ] = Path("vtok-grown"),
    resume: Annotated[
        str, typer.Option(help="auto continues the newest undamaged checkpoint; or never.")
    ] = "never",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Double a tokenizer's temporal compression: train new parts on the frozen model."""
    from .grow import run_grow

    left = run_grow(
        model=model,
        recipe=recipe,
        overrides=overrides or [],
        out=out,
        mixing=mixing,
        resume=resume,
        device=device,
        as_json=as_json,
    )
    if left is not None:
        raise Interrupted(left)


def ask(
    model: Annotated[str, typer.Argument(help="Folder of a unified model (recipe of vtok_lm).")],
    video: Annotated[Path, typer.Argument(help="Video file.")],
    question: Annotated[str, typer.Argument(help="In words, in quotes.")],
    max_frames: Annotated[int, typer.Option(min=1, help="Frames to look at.")] = 512,
    fps: Annotated[
        float | None, typer.Option(help="Frames per second [default: that of the file].")
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Answer a question about a video with a unified model (VTok)."""
    from .unified import run_ask

    run_ask(
        model=model,
        video=video,
        question=question,
        max_frames=max_frames,
        fps=fps,
        device=device,
        as_json=as_json,
    )


def generate(
    model: Annotated[
        str,
        typer.Argument(help="Folder of a generator or a unified model, or a released checkpoint."),
    ],
    text: Annotated[
        str | None, typer.Argument(help="What the video shows, in quotes; unified models only.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for the videos [default: vtok-generated], or the video of a text "
            "[default: vtok-generated.mp4].",
        ),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option("-n", help="How many videos [default: 4; of a text one].")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Its tokenizer: folder or checkpoint [default: where it was trained]."),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Video i depends on seed + i, and its class, alone.")
    ] = 0,
    label: Annotated[
        list[int] | None,
        typer.Option(help="Class; given several times video i has label i, in turn."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Strength of the class or the text [default: 1, none]; below 0 away from it."
        ),
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="SiT: sde or ode [default: sde].")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="SiT: euler, heun; of ode also midpoint, rk4, dopri5."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="SiT: steps [default: 250 of sde, 50 of ode but dopri5]; of a text: those of the "
            "decoder [default: the model's].",
        ),
    ] = None,
    diffusion: Annotated[
        str | None,
        typer.Option(
            help="SiT, sde: sigma, linear, decreasing, increasing_decreasing, constant, sbdm "
            "[default: sigma]."
        ),
    ] = None,
    norm: Annotated[
        float | None, typer.Option(help="SiT, sde: factor of the diffusion [default: 1].")
    ] = None,
    last_step: Annotated[
        str | None,
        typer.Option(help="SiT, sde: mean, euler, tweedie or none [default: mean]."),
    ] = None,
    last_step_size: Annotated[
        float | None, typer.Option(help="SiT, sde: its length in time [default: 0.04].")
    ] = None,
    rtol: Annotated[
        float | None, typer.Option(help="SiT, dopri5: relative tolerance [default: 0.001].")
    ] = None,
    atol: Annotated[
        float | None, typer.Option(help="SiT, dopri5: absolute tolerance [default: 1e-6].")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="GPT, or of a text: 1 unchanged, 0 likeliest.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="GPT: draw among the k likeliest.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="GPT: draw among the likeliest of this probability.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Videos at a time [default: 4].")] = None,
    fps: Annotated[
        float | None,
        typer.Option(min=0.1, help="Frames per second [default: known, or 25; 8 of a text]."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Preset of a released checkpoint, such as sit_l_2.")
    ] = None,
    tokenizer_name: NameOption = None,
    override: OverrideOption = None,
    statistics: StatisticsOption = None,
    statistics_order: StatisticsOrderOption = None,
    last: Annotated[
        bool, typer.Option("--last", help="A checkpoint's last weights, not their averages.")
    ] = False,
    frames: Annotated[
        int | None, typer.Option(help="Of a text: length of the video [default: 32].")
    ] = None,
    height: Annotated[
        int | None, typer.Option(min=1, help="Of a text [default: the model's].")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Of a text [default: the model's].")
    ] = None,
    any_weights: AnyWeightsOption = False,
    trust_checkpoint: TrustOption = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Make new videos with a generator (SiT or GPT), or of a text with a unified model (VTok)."""
    if not 0 <= seed < _NUM_SEEDS:
        raise ValueError(f"generate: --seed must be in 0..{_NUM_SEEDS - 1}, got {seed}")
    of_generators = {
        "sampler": sampler,
        "method": method,
        "diffusion": diffusion,
        "norm": norm,
        "last_step": last_step,
        "last_step_size": last_step_size,
        "rtol": rtol,
        "atol": atol,
        "top_k": top_k,
        "top_p": top_p,
    }
    if text is not None:
        from .unified import TextVideoOptions, run_generate_text

        refuse_options(
            "generate",
            "with a text",
            {
                "-n": num_samples,
                "--tokenizer": tokenizer,
                "--label": label,
                **{f"--{key.replace('_', '-')}": value for key, value in of_generators.items()},
                "--batch-size": batch_size,
                "--name": name,
                "--override": override,
                "--tokenizer-name": tokenizer_name,
                "--statistics": statistics,
                "--statistics-order": statistics_order,
                "--last": last,
                "--any-weights": any_weights,
            },
        )
        run_generate_text(
            TextVideoOptions(
                model=model,
                text=text,
                out=Path("vtok-generated.mp4") if out is None else out,
                num_frames=32 if frames is None else frames,
                height=height,
                width=width,
                fps=fps,
                temperature=1.0 if temperature is None else temperature,
                guidance=1.0 if guidance is None else guidance,
                num_steps=steps,
                seed=seed,
                device=device,
            ),
            as_json=as_json,
        )
        return
    from .generate import GenerateOptions, run_generate

    of_texts = {"--frames": frames, "--height": height, "--width": width}
    refuse_options("generate", "with a generator, whose videos have one size", of_texts)
    given = {"num_steps": steps, "temperature": temperature, **of_generators}
    sampling: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if last_step == "none":
        sampling["last_step"] = None
    options = GenerateOptions(
        model=model,
        out=Path("vtok-generated") if out is None else out,
        name=name,
        overrides=parsed_overrides("generate", override or []),
        last=last,
        statistics=statistics,
        statistics_order=statistics_order,
        tokenizer=tokenizer,
        tokenizer_name=tokenizer_name,
        trust_checkpoint=trust_checkpoint,
        any_weights=any_weights,
        num_samples=4 if num_samples is None else num_samples,
        batch_size=4 if batch_size is None else batch_size,
        seed=seed,
        labels=tuple(label or ()),
        guidance=1.0 if guidance is None else guidance,
        sampling=sampling,
        fps=fps,
        device=device,
    )
    run_generate(options, as_json=as_json)
