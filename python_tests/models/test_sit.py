"""SiT: names, latents of both kinds, guidance, sampling, and files."""

import argparse
import json

import pytest
import torch
from helpers import RELEASE

import vtok_ext as vt
from vtok_ext.models import CoordTokConfig, SiT, SiTConfig
from vtok_ext.models.failed_computation import FailedComputationError
from vtok_ext.models.generator import LatentOrigin
from vtok_ext.models.latent_statistics import (
    LatentStatistics,
    StatisticsCounter,
    read_reference_log,
    read_statistics,
)
from vtok_ext.models.transport import noise_like

THIN = {"hidden_size": 32, "depth": 2, "num_heads": 2}
PLANES = {"latent": "triplane", "input_size": (8, 4, 6), "in_channels": 3, **THIN}
GRID = {"latent": "grid", "input_size": (3, 4, 6), "in_channels": 3, **THIN}

# A pickled file that is read with torch < 2.6 must be trusted; it runs nothing all the same.
TRUSTED = {"trust_checkpoint": RELEASE < (2, 6)}


def random_sit(seed=0, **config):
    """A SiT whose output depends on everything: fresh ones give zero."""
    torch.manual_seed(seed)
    model = SiT(SiTConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not bool(parameter.any()):
                parameter.normal_(std=0.1)
    return model.eval()


def latents(config, batch=2, seed=0):
    """Latents in the layout of the tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    t, x, y = config["input_size"]
    c = config["in_channels"]
    if config["latent"] == "grid":
        return torch.randn(batch, c, t, x, y, generator=generator)
    sizes = {"xy": (x, y), "yt": (t, y), "xt": (t, x)}
    return {k: torch.randn(batch, *size, c, generator=generator) for k, size in sizes.items()}


def with_statistics(model, config):
    counter = StatisticsCounter()
    counter.update(latents(config, 8, seed=5))
    model.statistics = counter.result()
    return model


@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_presets(size, patch):
    with torch.device("meta"):
        model = vt.create_generator(f"sit_{size}_{patch}")
    tokens = sum(torch.Size(model.config.part_grid(p)).numel() for p in model.config.parts())
    assert tokens == 1280 // patch**2
    if (size, patch) == ("l", 2):
        assert sum(p.numel() for p in model.parameters()) == 461_462_720


@pytest.mark.parametrize("config", [PLANES, GRID])
def test_every_input_matters_and_fresh_models_give_zero(config):
    model = random_sit(num_classes=3, **config)
    with_statistics(model, config)
    x = model.statistics.normalize(latents(config))
    t, y = torch.tensor([0.2, 0.7]), torch.tensor([0, 2])
    with torch.no_grad():
        out = model(x, t, y)
        assert {k: v.shape for k, v in out.items()} == {k: v.shape for k, v in x.items()}
        fresh = SiT(SiTConfig(**config))(x, t)
        assert all(not bool(v.any()) for v in fresh.values())
        for part in x:  # attention over all tokens: each part sees each other one
            changed = model({**x, part: x[part] + 1}, t, y)
            assert all(not torch.equal(changed[k], out[k]) for k in x)
        assert not torch.equal(
            model(x, t + 0.1, y)["xy" if "xy" in x else "grid"][0],
            out["xy" if "xy" in x else "grid"][0],
        )
        other = model(x, t, torch.tensor([0, 1]))
        assert all(torch.allclose(other[k][0], out[k][0], atol=1e-5) for k in x)
        assert all(not torch.allclose(other[k][1], out[k][1], atol=1e-5) for k in x)


def test_tokens_of_a_plane_have_places():
    """Without positional vectors, moving the patches would move the output and nothing else."""
    for config in (PLANES, GRID):
        model = random_sit(**config)
        x = with_statistics(model, config).statistics.normalize(latents(config, 1))
        t = torch.tensor([0.5])
        with torch.no_grad():
            for part, value in x.items():
                for axis in range(2, value.dim()):
                    rolled = {**x, part: value.roll(2, axis)}
                    moved = model(rolled, t)[part]
                    assert not torch.allclose(moved, model(x, t)[part].roll(2, axis), atol=1e-4)


def test_bare_tensor_stands_for_a_grid():
    model, x = random_sit(**GRID), latents(GRID)
    t = torch.tensor([0.1, 0.9])
    with torch.no_grad():
        assert torch.equal(model(x, t), model({"grid": x}, t)["grid"])


def test_loss_trains_every_parameter_but_the_fixed_one():
    model = with_statistics(random_sit(num_classes=2, class_dropout=0.5, **PLANES), PLANES).train()
    loss = model.loss(latents(PLANES, 16), torch.arange(16) % 2)
    assert loss.shape == (16,)
    loss.mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert without == ["pos_embed_xy"]


def test_guidance():
    model = random_sit(num_classes=2, class_dropout=0.1, **PLANES)
    x = with_statistics(model, PLANES).statistics.normalize(latents(PLANES))
    t, y = torch.tensor([0.3, 0.3]), torch.tensor([1, 0])
    with torch.no_grad():
        label, none = model(x, t, y), model(x, t, torch.tensor([2, 2]))
        guided = model.network(y, guidance=2.5)(x, t)
        for part in x:
            expected = none[part] + 2.5 * (label[part] - none[part])
            torch.testing.assert_close(guided[part], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="guidance must be 1 for a model trained without"):
        random_sit(**PLANES).network(guidance=2.0)


def test_guidance_of_a_bare_grid():
    model, t = random_sit(num_classes=2, class_dropout=0.1, **GRID), torch.tensor([0.3, 0.8])
    x, network = latents(GRID), model.network(torch.tensor([1, 0]), guidance=2.5)
    with torch.no_grad():
        assert torch.equal(network(x, t), network({"grid": x}, t)["grid"])


@pytest.mark.parametrize("config", [PLANES, GRID])
@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_sampling(config, sampler):
    model = with_statistics(random_sit(num_classes=3, **config), config)
    options = {"sampler": sampler, "num_steps": 3} | (
        {"method": "euler"} if sampler == "ode" else {}
    )

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.tensor([0, 2])
        return model.sample(2, labels=labels, generator=generator, **options)

    first, second, other = run(1), run(1), run(2)
    if config is GRID:
        first, second, other = ({"grid": x} for x in (first, second, other))
    else:
        assert list(first) == ["xy", "yt", "xt"] and first["yt"].shape == (2, 8, 6, 3)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize("config", [PLANES, GRID])
@pytest.mark.parametrize("sampler", ["ode", "sde"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_sampling_in_16_bits(config, sampler, guidance):
    """Noise and steps are those of float32; only the network rounds."""
    model = with_statistics(random_sit(class_dropout=0.1, **config), config)
    many = {"method": "euler"} if sampler == "ode" else {}

    def run():
        made = model.sample(
            2,
            sampler=sampler,
            guidance=guidance,
            num_steps=200,
            generator=torch.Generator().manual_seed(1),
            **many,
        )
        return made if isinstance(made, dict) else {"grid": made}

    exact = run()
    model.to(torch.bfloat16)
    for part, value in run().items():
        assert value.dtype == torch.bfloat16
        error = (value.float() - exact[part]).square().mean().sqrt()
        assert float(error) < 0.03 * float(exact[part].std())


@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
def test_path_and_prediction_of_the_configuration(path, prediction):
    """They decide loss and sampling: a fresh network, which gives zero, has a known answer."""
    model = with_statistics(SiT(SiTConfig(path=path, prediction=prediction, **GRID)), GRID)
    values, generator = latents(GRID), torch.Generator().manual_seed(2)
    x1, kept = model.statistics.normalize(values), generator.clone_state()
    t, x0 = model.transport.draw(x1, kept)
    target = x0["grid"]
    if prediction == "velocity":
        target = model.transport.path_velocity(t, x0, x1)["grid"]
    torch.testing.assert_close(
        model.loss(values, generator=generator), target.square().flatten(1).mean(1)
    )
    made = model.sample(
        1,
        sampler="ode",
        method="rk4",
        num_steps=100,
        generator=torch.Generator().manual_seed(3),
    )
    noise = noise_like({"grid": latents(GRID, 1)}, torch.Generator().manual_seed(3))["grid"]
    # Without a velocity noise stays; without noise or score v = alpha' / alpha x, so x ~ alpha.
    low, high = model.transport.time_range
    ends = model.transport.coefficients(torch.tensor([low, high], dtype=torch.float64))[0]
    growth = 1.0 if prediction == "velocity" else float(ends[1] / ends[0])
    found = model.statistics.normalize(made)["grid"] / noise
    torch.testing.assert_close(found, torch.full_like(found, growth), rtol=0.2, atol=0)


def test_a_trained_generator_makes_what_it_saw(tmp_path):
    """Four steps from one latent: the flow learns to end there. A fresh model ends in noise."""
    torch.manual_seed(0)
    model = SiT(SiTConfig(**GRID))
    target = latents(GRID, 1, seed=3)
    model.statistics = LatentStatistics({"grid": torch.zeros(3)}, {"grid": torch.ones(3)})

    def distance():
        generator = torch.Generator().manual_seed(0)
        made = model.eval().sample(
            4, sampler="ode", method="heun", num_steps=8, generator=generator
        )
        return float((made - target).square().mean())

    before = distance()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model.train().loss(target.expand(16, -1, -1, -1, -1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert distance() < before / 10


# Statistics.


@pytest.mark.parametrize("config", [PLANES, GRID])
def test_statistics(config):
    counter, values = StatisticsCounter(), latents(config, 6)
    parts = {"grid": values} if config is GRID else values
    for i in range(0, 6, 2):
        part = {k: v[i : i + 2] * 3 + 1 for k, v in parts.items()}
        counter.update(part["grid"] if config is GRID else part)
    statistics = counter.result()
    assert counter.num_samples == 6
    scaled = {k: v * 3 + 1 for k, v in parts.items()}
    given = scaled["grid"] if config is GRID else scaled
    normalized = statistics.normalize(given)
    for value in normalized.values():
        channels = value.transpose(0, 1).flatten(1)
        torch.testing.assert_close(channels.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(channels.std(1, correction=0), torch.ones(3))
    back = statistics.denormalize(normalized)
    back = {"grid": back} if config is GRID else back
    assert all(torch.allclose(back[k], scaled[k], atol=1e-5) for k in scaled)
    again = LatentStatistics.from_dict(json.loads(json.dumps(statistics.to_dict())))
    assert all(torch.equal(again.mean[k], statistics.mean[k]) for k in again.mean)
    assert all(torch.equal(again.std[k], statistics.std[k]) for k in again.std)


def write_log(path, vectors, width=None):
    """As torch prints vectors of eight numbers with four decimals; long ones wrap."""
    lines = ["[2025-01-01 00:00:00] Experiment directory created at results/000"]
    for vector in vectors:
        text = ", ".join(f"{number: .4f}" for number in vector)
        if width:
            text = text.replace(", ", ",\n        ", 1)
        lines.append(f"[2025-01-01 00:00:01] tensor([{text}], device='cuda:0')")
    path.write_text("\n".join([*lines, "[2025-01-01 00:00:02] (step=0000100) Train Loss: 0.9"]))


@pytest.mark.parametrize("wrapped", [None, 80])
@pytest.mark.parametrize("order", ["alternating", "means_first"])
def test_statistics_of_a_reference_log(tmp_path, order, wrapped):
    means = [[-10.0123 * (i + 1), 0.5, 0.25] for i in range(3)]
    stds = [[1.0 + i, 2.0, 0.125] for i in range(3)]
    pairs = [v for pair in zip(means, stds, strict=True) for v in pair]
    write_log(tmp_path / "log.txt", pairs if order == "alternating" else means + stds, wrapped)
    found = read_reference_log(tmp_path / "log.txt")
    for plane, mean, std in zip(("xy", "yt", "xt"), means, stds, strict=True):
        torch.testing.assert_close(found.mean[plane], torch.tensor(mean))
        torch.testing.assert_close(found.std[plane], torch.tensor(std))


def test_reference_logs_that_do_not_say(tmp_path):
    path = tmp_path / "log.txt"
    write_log(path, [[0.1, 0.2]] * 6)
    with pytest.raises(ValueError, match="order must be given"):
        read_reference_log(path)
    assert read_reference_log(path, "means_first").std["xy"].tolist() == pytest.approx([0.1, 0.2])
    write_log(path, [[0.1, 0.2]] * 4)
    with pytest.raises(ValueError, match="must hold six vectors of one length"):
        read_reference_log(path)
    with pytest.raises(FileNotFoundError):
        read_reference_log(tmp_path / "none")


@pytest.mark.parametrize("prefix", ["tensor(", ""])
def test_other_lists_of_a_reference_log_are_passed_over(tmp_path, prefix):
    path = tmp_path / "log.txt"
    means, stds = [[-1.0 - i, 0.5] for i in range(3)], [[1.0 + i, 2.0] for i in range(3)]
    write_log(path, means + stds)
    log = path.read_text().replace("tensor(", prefix)
    path.write_text("patches=[1, 2, 2]\n" + log)
    found = read_reference_log(path)
    assert found.mean["xt"].tolist() == means[2] and found.std["xy"].tolist() == stds[0]
    path.write_text(path.read_text() + "\n" + log)  # resumed
    assert read_reference_log(path).to_dict() == found.to_dict()
    path.write_text("sizes=[8, 16]\n" + log)  # as long as a vector
    if prefix:
        assert read_reference_log(path, "means_first").to_dict() == found.to_dict()
    else:
        with pytest.raises(ValueError, match=r"one length in a row, got lengths .2, 2, 2, 2, 2, 2"):
            read_reference_log(path, "means_first")


def test_statistics_of_a_json_file_go_by_name(tmp_path):
    statistics = with_statistics(random_sit(**PLANES), PLANES).statistics.to_dict()
    shuffled = {k: {n: v[n] for n in ("xt", "xy", "yt")} for k, v in statistics.items()}
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps(dict(reversed(shuffled.items()))))
    assert read_statistics(path).to_dict() == statistics
    with pytest.raises(ValueError, match="order must be None for .*statistics.json"):
        read_statistics(path, "means_first")
    with pytest.raises(ValueError, match="must be a log, got JSON"):
        read_reference_log(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="statistics.json' must be JSON"):
        read_statistics(path)
    with pytest.raises(FileNotFoundError, match="must be a file, got none"):
        read_statistics(tmp_path / "none.json")
    write_log(tmp_path / "log.txt", [[-0.5, 0.25]] * 3 + [[1.0, 2.0]] * 3)
    found = read_statistics(tmp_path / "log.txt")
    assert found.to_dict() == read_reference_log(tmp_path / "log.txt").to_dict()


def test_statistics_are_of_latents_that_vary():
    counter = StatisticsCounter()
    for _ in range(50):
        counter.update(torch.stack([torch.randn(8, 2, 2), torch.full((8, 2, 2), 0.1)])[None])
    with pytest.raises(ValueError, match="channel 1 of grid must vary, got 0.1 in all latents"):
        counter.result()
    with pytest.raises(ValueError, match=r"channels must be .'grid': 2., got .'grid': 1."):
        counter.update(torch.randn(1, 1, 8, 2, 2))
    with pytest.raises(ValueError, match=r"channels must be .'grid': 2., got .'xy': 3"):
        counter.update(latents(PLANES))
    ids = torch.ones(1, 2, 8, 2, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match="grid must be of floating point, got torch.int64"):
        counter.update(ids)
    statistics = LatentStatistics({"grid": torch.zeros(2)}, {"grid": torch.full((2,), 0.5)})
    with pytest.raises(TypeError, match="grid must be of floating point, got torch.int64"):
        statistics.normalize(ids)


@pytest.mark.parametrize(
    "values",
    [None, {}, {"mean": {"xy": [1.0]}, "std": {"xy": [1.0]}},
     {"mean": {"grid": [1.0]}, "std": {"grid": [0.0]}},
     {"mean": {"grid": [1.0]}, "std": {"grid": [float("inf")]}},
     {"mean": {"grid": [1.0]}, "std": {"grid": [1.0, 2.0]}}],
)  # fmt: skip
def test_statistics_that_are_none(values):
    with pytest.raises(ValueError, match="LatentStatistics"):
        LatentStatistics.from_dict(values)


# Files.


def test_saving_keeps_statistics_and_origin(tmp_path):
    model = with_statistics(random_sit(**PLANES), PLANES)
    model.origin = LatentOrigin(9, 32, 48, 25.0, "some@id+1", "folder")
    model.save_pretrained(tmp_path / "sit")
    found = vt.load_generator(tmp_path / "sit")
    assert found.origin == model.origin and not found.training
    assert torch.equal(found.statistics.std["yt"], model.statistics.std["yt"])
    x = noise_like(model.statistics.normalize(latents(PLANES)))
    t = torch.tensor([0.2, 0.5])
    with torch.no_grad():
        assert all(torch.equal(v, model(x, t)[k]) for k, v in found(x, t).items())
    with pytest.raises(ValueError, match="model must be one of"):
        vt.load_model(tmp_path / "sit")
    with pytest.raises(ValueError, match="must be absent for a saved generator"):
        vt.load_generator(tmp_path / "sit", "sit_l_2")
    other = with_statistics(random_sit(**GRID), GRID).statistics
    with pytest.raises(ValueError, match="load_generator: statistics must be of {'xy': 3"):
        vt.load_generator(tmp_path / "sit", statistics=other)
    model.statistics = other
    model.save_pretrained(tmp_path / "sit")
    with pytest.raises(ValueError, match="from_pretrained: statistics must be of {'xy': 3"):
        vt.load_generator(tmp_path / "sit")


def released_file(path, model, **more):
    ema = {k: v + (1 if v.dim() == 2 else 0) for k, v in model.state_dict().items()}
    content = {
        "model": model.state_dict(),
        "ema": ema,
        "opt": {"state": {}},
        "args": argparse.Namespace(model="SiT-L/2", lr=1e-4, betas=(0.9, 0.999)),
        **more,
    }
    torch.save(content, path)
    return ema


def test_released_checkpoints(tmp_path):
    config = {k: v for k, v in PLANES.items() if k != "latent"}
    model = random_sit(**PLANES)
    path = tmp_path / "0600000.pt"
    ema = released_file(path, model)
    found = vt.load_generator(path, "sit_l_2", **TRUSTED, **config)
    assert all(torch.equal(v, ema[k]) for k, v in found.state_dict().items())
    last = vt.load_generator(path, "sit_l_2", ema=False, **TRUSTED, **config)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in last.state_dict().items())
    with pytest.raises(ValueError, match="must know the statistics of its latents"):
        found.sample(1)
    with pytest.raises(ValueError, match="name must say which generator"):
        vt.load_generator(path)
    with pytest.raises(ValueError, match="weights must be those of sit_b_2"):
        vt.load_generator(path, "sit_b_2", **TRUSTED)
    for content in ([1, 2], torch.zeros(3), {"ema": 1}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="load_generator: .* must hold"):
            vt.load_generator(path, "sit_l_2", **TRUSTED)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="load_generator: .* must be a checkpoint") as found:
        vt.load_generator(path, "sit_l_2", **TRUSTED)
    assert "weights_only" not in str(found.value), "it advises to execute the file"


def test_a_released_checkpoint_tells_the_size_of_square_planes(tmp_path):
    path = tmp_path / "0600000.pt"
    for size in ((32, 32, 32), (8, 4, 4)):
        released_file(path, random_sit(input_size=size, in_channels=8, num_classes=11, **THIN))
        classes = {"num_classes": 10, "class_dropout": 0.1}
        found = vt.load_generator(path, "sit_l_2", **TRUSTED, **THIN, **classes)
        assert found.config.input_size == size and found.config.has_none
    with pytest.raises(ValueError, match=r"embedding_table.weight .11, 32. instead of .1, 32"):
        vt.load_generator(path, "sit_l_2", **TRUSTED, **THIN)


class _Runs:
    def __reduce__(self):
        return print, ("this ran",)


def test_a_checkpoint_runs_nothing(tmp_path, capsys):
    path = tmp_path / "bad.pt"
    released_file(path, random_sit(**PLANES), more=_Runs())
    with pytest.raises(ValueError, match="must be a checkpoint of tensors"):
        vt.load_generator(path, "sit_l_2", **TRUSTED)
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SiTConfig(input_size=(32, 15, 16)), "input_size must be multiples of the patches"),
        (lambda: SiTConfig(hidden_size=30), "hidden_size must be a multiple of 4"),
        (lambda: SiTConfig(class_dropout=1.0), "class_dropout must be below 1"),
        (lambda: SiTConfig(temporal_patch_size=2), "temporal_patch_size must be 1 for planes"),
        (lambda: vt.create_generator("sit_l2"), "did you mean 'sit_"),
        (lambda: vt.create_generator("sit_s_2", dept=2), "did you mean 'depth'"),
        (lambda: random_sit(**GRID)(latents(GRID)[..., :4], torch.zeros(2)), "grid must be .B, 3"),
        (lambda: random_sit(**GRID).sample(1, sampler="x"), "sampler must be one of"),
        (
            lambda: random_sit(**GRID).sample(1, labels=torch.tensor([1])),
            "labels must be 1 integers in 0..0",
        ),
        (lambda: random_sit(**GRID).sample(1, labels=[0]), r"labels must be .* got \[0\]"),
        (lambda: sample_with_statistics_of(5), r"statistics must be of {'grid': 3} channels"),
        (lambda: random_sit(**GRID).network(guidance=float("nan")), "guidance must be finite"),
        (lambda: LatentOrigin(0, 1, 1), "sizes must be integers >= 1"),
        (lambda: LatentOrigin(True, 1, 1), "sizes must be integers >= 1"),
        (lambda: LatentOrigin(1, 1, 1, float("inf")), "fps must be None, or finite and positive"),
        (lambda: LatentOrigin(1, 1, 1, True), "fps must be None, or finite and positive"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(TypeError, match="x must be a dict of xy, yt, xt"):
        random_sit(**PLANES)({"xy": torch.zeros(1)}, torch.zeros(1))


@pytest.mark.parametrize("config", [PLANES, GRID])
def test_latents_of_other_channels_are_refused(config):
    statistics = with_statistics(random_sit(**config), config).statistics
    single = latents({**config, "in_channels": 1})
    for call in (statistics.normalize, statistics.restore):
        with pytest.raises(ValueError, match="must have 3 channels, got 1"):
            call(single)


def test_times_and_labels_are_one_per_sample():
    model, one = random_sit(num_classes=2, **GRID), latents(GRID, 1)
    three, labels = torch.full((3,), 0.5), torch.tensor([0, 1, 0])
    whole = one.expand(3, -1, -1, -1, -1)
    for x, t, y in ((one, three, None), (one, three, labels), (whole, three, labels[:1])):
        with pytest.raises(ValueError, match="t and y must be .B. for B samples, got .3."):
            model(x, t, y)
    planes = {**latents(PLANES), "xt": latents(PLANES, 1)["xt"]}
    planes = {name: plane.movedim(-1, 1) for name, plane in planes.items()}
    with pytest.raises(ValueError, match="for {'xy': 2, 'yt': 2, 'xt': 1}"):
        random_sit(**PLANES)(planes, three[:2])
    with pytest.raises(ValueError, match=r"SiT: labels must be 3 integers in 0..1, got .0, 2, 0."):
        model(whole, three, labels * 2)
    with pytest.raises(ValueError, match=r"SiT: labels must be 3 integers in 0..1, got .0.0, 1"):
        model(whole, three, labels.float())
    with_statistics(model, GRID)
    for wrong in (labels[:1], labels[:2] * 2, labels[:2].float()):
        with pytest.raises(ValueError, match="loss: labels must be 2 integers in 0..1"):
            model.loss(latents(GRID), wrong)


def sample_with_statistics_of(channels):
    model = random_sit(**GRID)
    model.statistics = LatentStatistics(
        {"grid": torch.zeros(channels)}, {"grid": torch.ones(channels)}
    )
    return model.sample(1, num_steps=2)


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_latents_that_are_not_finite_are_no_sample(sampler):
    model = with_statistics(random_sit(**PLANES), PLANES)
    with torch.no_grad():
        model.t_embedder.mlp[0].bias.fill_(float("nan"))
    options = {"sampler": sampler, "method": "euler", "num_steps": 2}
    with pytest.raises(FailedComputationError, match="latents of SiT must be finite"):
        model.sample(1, **options)


def test_decoding_with_the_tokenizer_it_was_trained_on():
    torch.manual_seed(0)
    thin = {
        "enc_embed_dim": 16,
        "enc_num_layers": 1,
        "enc_patch_num_layers": 0,
        "enc_num_heads": 2,
        "dec_embed_dim": 16,
        "dec_num_layers": 1,
        "dec_num_heads": 2,
        "video_shape": (8, 16, 16),
        "enc_patch_size": (4, 8, 8),
        "dec_patch_size": (1, 8, 8),
        "latent_resolution": (8, 4, 6),
        "latent_patch_size": (4, 2, 2),
        "latent_channels": 3,
    }
    tokenizer = vt.models.CoordTok(CoordTokConfig(**thin)).eval()
    model = with_statistics(random_sit(**PLANES), PLANES)
    made = model.sample(2, sampler="ode", method="euler", num_steps=2)
    with pytest.raises(ValueError, match="must know the origin"):
        model.decode(tokenizer, made)
    model.origin = LatentOrigin(7, 16, 12, tokenizer_id=tokenizer.model_id)
    with torch.no_grad():
        video = model.decode(tokenizer, made)
    assert video.shape == (2, 3, 7, 16, 12) and video.dtype == torch.uint8
    with torch.no_grad():
        next(tokenizer.parameters()).add_(1)
    with pytest.raises(ValueError, match="another training run"):
        model.decode(tokenizer, made)
