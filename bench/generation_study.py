"""How good a small generator is: KVD of its clips against that of clips without a learned prior.

    vtok train smoke_kl loss.perceptual_weight=0 loss.discriminator=none ... --out STUDY/tokenizer
    vtok train sit latent.tokenizer=STUDY/tokenizer/model ... --out STUDY/generator
    python bench/generation_study.py STUDY/generator/model --out STUDY

All sets have the same number of clips, are decoded by the same tokenizer and compared with the same
held-out procedural clips, which neither tokenizer nor generator has seen:

    generator        latents of the trained generator
    gaussian         normal latents with the mean and deviation of the training latents, per channel
    standard_normal  N(0, 1) latents, the prior of a variational autoencoder
    untrained        the generator's network with fresh weights and the same sampler
    reconstruction   latents of further held-out clips: what the tokenizer itself costs
    real             further held-out clips themselves: the distance of two samples of one thing

The distance of generated clips to the nearest training clip (root mean square of the difference of
decoded pixels in 0..1) stands beside that of held-out clips: a generator that repeats its training
clips is much nearer than those.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vtok_ext as vt
from vtok_ext.cli.generate import contact_sheet
from vtok_ext.data.picture import write_png
from vtok_ext.data.procedural import procedural_clip
from vtok_ext.metrics.kvd import FEATURES, kernel_distance, kvd_features
from vtok_ext.models.generator import LatentGenerator

# Beyond the seeds of training and validation clips.
_REFERENCE_SEED, _HELD_OUT_SEED = 2_000_000_000, 3_000_000_000
_BATCH = 32


def batches(count: int, make: Callable[[range], Tensor]) -> Tensor:
    """Returns the clips [count, 3, T, H, W] uint8 of `make`, a batch at a time."""
    parts = [range(i, min(i + _BATCH, count)) for i in range(0, count, _BATCH)]
    return torch.cat([make(part) for part in parts])


def fresh(generator: LatentGenerator, seed: int = 0) -> LatentGenerator:
    """Returns a generator of the same configuration with weights that no training has touched.

    Output layers begin at zero; they get random weights of the size that others begin with, since a
    network that gives zero is no network.
    """
    torch.manual_seed(seed)
    model = type(generator)(generator.config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not bool(parameter.any()):
                parameter.normal_(std=0.02)
    model.statistics, model.origin = generator.statistics, generator.origin
    return model.eval()


def latent_sets(
    generator: LatentGenerator, options: dict[str, Any]
) -> dict[str, Callable[[range], Any]]:
    """Returns by name what makes the latents of some numbers."""
    statistics = generator.require_statistics("study")
    config = generator.config
    untrained = fresh(generator)

    def sources(numbers: range) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in numbers]

    def sampled(model: LatentGenerator) -> Callable[[range], Any]:
        return lambda numbers: model.sample(len(numbers), generator=sources(numbers), **options)

    def noise(numbers: range) -> dict[str, Tensor]:
        shapes = {part: (config.in_channels, *config.part_size(part)) for part in config.parts()}
        drawn = [
            {part: torch.randn(shape, generator=g) for part, shape in shapes.items()}
            for g in sources(numbers)
        ]
        return {part: torch.stack([one[part] for one in drawn]) for part in shapes}

    def standard(numbers: range) -> Any:
        parts = noise(numbers)
        if set(parts) == {"grid"}:
            return parts["grid"]
        return {part: value.movedim(1, -1).contiguous() for part, value in parts.items()}

    return {
        "generator": sampled(generator),
        "gaussian": lambda numbers: statistics.denormalize(noise(numbers)),
        "standard_normal": standard,
        "untrained": sampled(untrained),
    }


def nearest(clips: Tensor, training: Tensor) -> Tensor:
    """Returns for each clip the root mean square distance to the nearest training clip, [N]."""
    x, y = (c.flatten(1).float() / 255 for c in (clips, training))
    return (
        torch.cat([torch.cdist(part, y).min(1).values for part in x.split(64)]) / x.shape[1] ** 0.5
    )


def summary(distances: Tensor) -> dict[str, float]:
    """Returns mean, least and 5 % quantile."""
    return {
        "mean": distances.mean().item(),
        "least": distances.min().item(),
        "quantile_5": distances.quantile(0.05).item(),
    }


@torch.no_grad()
def study(
    folder: str, out: Path, count: int, num_training: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Returns what was measured, after writing OUT/generation.json and OUT/generation.png."""
    generator = vt.load_generator(folder)
    origin = generator.origin
    tokenizer = vt.load_model(origin.tokenizer)
    shape = (origin.num_frames, origin.height, origin.width)

    def real(first_seed: int) -> Callable[[range], Tensor]:
        return lambda n: torch.stack([procedural_clip(*shape, seed=first_seed + i) for i in n])

    def reconstructed(first_seed: int) -> Callable[[range], Tensor]:
        def make(numbers: range) -> Tensor:
            clips = real(first_seed)(numbers)
            return tokenizer.decode(tokenizer.encode(clips), output="uint8")

        return make

    def decoded(make_latent: Callable[[range], Any]) -> Callable[[range], Tensor]:
        return lambda numbers: generator.decode(tokenizer, make_latent(numbers))

    start = time.monotonic()
    makers = {name: decoded(make) for name, make in latent_sets(generator, options).items()}
    makers["reconstruction"] = reconstructed(_HELD_OUT_SEED)
    makers["real"] = real(_HELD_OUT_SEED)
    clips = {name: batches(count, make) for name, make in makers.items()}
    reference = {
        "held-out clips": kvd_features(batches(count, real(_REFERENCE_SEED))),
        "their reconstructions": kvd_features(batches(count, reconstructed(_REFERENCE_SEED))),
    }
    features = {name: kvd_features(made) for name, made in clips.items()}
    rows = {}
    for name in clips:
        rows[name] = {}
        for against, expected in reference.items():
            found = kernel_distance(features[name], expected)
            rows[name][f"kvd to {against}"] = [found.value, found.low, found.high]
    training = batches(num_training, reconstructed(0))
    distances = {
        name: summary(nearest(clips[name], training)) for name in ("generator", "reconstruction")
    }
    result = {
        "features": FEATURES,
        "clips_per_set": count,
        "training_clips": num_training,
        "clip": list(shape),
        "sampling": options,
        "sets": rows,
        "nearest_training_clip": distances,
        "generator_parameters": sum(p.numel() for p in generator.parameters()),
        "tokenizer": tokenizer.name,
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - start, 1),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "generation.json").write_text(json.dumps(result, indent=2) + "\n")
    shown = [clips[name][i] for name in clips for i in range(3)]
    write_png(out / "generation.png", contact_sheet(shown))
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """Returns the result for people."""
    found = []
    for name, row in result["sets"].items():
        parts = [f"{k} {v[0]:.4f} ({v[1]:.4f} to {v[2]:.4f})" for k, v in row.items()]
        found.append(f"{name:16} {', '.join(parts)}")
    for name, row in result["nearest_training_clip"].items():
        parts = [f"{k} {v:.4f}" for k, v in row.items()]
        found.append(f"nearest training clip of {name}: {', '.join(parts)}")
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Returns the result of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("generator", help="folder of a trained SiT")
    parser.add_argument("--out", type=Path, default=Path("generation-study"))
    parser.add_argument("--count", type=int, default=640, help="clips of every set")
    parser.add_argument("--training-clips", type=int, default=1024)
    parser.add_argument("--sampler", default="sde")
    parser.add_argument("--method", default="euler")
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args(arguments)
    options = {"sampler": given.sampler, "method": given.method}
    if given.method != "dopri5":  # which chooses its own
        options["num_steps"] = given.steps
    result = study(given.generator, given.out, given.count, given.training_clips, options)
    print("\n".join(lines(result)))
    return result


if __name__ == "__main__":
    main()
