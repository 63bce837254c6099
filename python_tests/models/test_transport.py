"""Paths and samplers, on data whose flow is known in closed form.

For data x1 ~ N(MEAN, STD^2) the state at t is normal with mean alpha MEAN and variance
(alpha STD)^2 + sigma^2, and the flow keeps the standardised value of a point: noise x0 arrives at
MEAN + STD x0.
"""

import pytest
import torch

from vtok_ext.models.failed_computation import FailedComputationError
from vtok_ext.models.ode import ODE_METHODS, sample_ode
from vtok_ext.models.sde import DIFFUSIONS, LAST_STEPS, SDE_METHODS, sample_sde
from vtok_ext.models.transport import PATHS, PREDICTIONS, Transport, map_state, noise_like

MEAN, STD = 1.5, 0.4


def exact_network(transport):
    """Returns the best prediction of noise, velocity or score, for tensors."""

    def network(x, t):
        t = t.to(x.dtype).view(-1, *(1,) * (x.dim() - 1))
        alpha, sigma, d_alpha, d_sigma = transport.coefficients(t)
        variance = (alpha * STD) ** 2 + sigma**2
        centred = x - alpha * MEAN
        data = MEAN + alpha * STD**2 / variance * centred
        noise = sigma / variance * centred
        if transport.prediction == "noise":
            return noise
        return (
            -centred / variance
            if transport.prediction == "score"
            else (d_alpha * data + d_sigma * noise)
        )

    return network


def zeros(x, t):
    return torch.zeros_like(x)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predictions_stand_for_one_another(path, prediction):
    transport = Transport(path, prediction)
    x, t = draw(3, 5), torch.tensor([0.2, 0.5, 0.9])
    predicted = exact_network(transport)(x, t)
    for name, convert in (("velocity", transport.velocity), ("noise", transport.noise)):
        torch.testing.assert_close(
            convert(predicted, t, x), exact_network(Transport(path, name))(x, t)
        )
    data, noise = transport.data(predicted, t, x), transport.noise(predicted, t, x)
    torch.testing.assert_close(transport.interpolate(t, noise, data), x)


@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_derivative_of_the_path(path):
    transport, x0, x1 = Transport(path), draw(2, 4), draw(2, 4, seed=1)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)
    x = transport.interpolate(t, x0, x1)
    (slope,) = torch.autograd.grad(x[:, 2].sum(), t)
    torch.testing.assert_close(slope, transport.path_velocity(t, x0, x1)[:, 2])
    ends = transport.interpolate(torch.tensor([0.0, 1.0]), x0, x1)
    torch.testing.assert_close(ends, torch.stack([x0[0], x1[1]]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_is_least_for_the_best_prediction(path, prediction):
    transport = Transport(path, prediction)
    x1 = MEAN + STD * draw(4096, 3)
    best = exact_network(transport)
    generator = torch.Generator().manual_seed(3)
    t, x0 = transport.draw(x1, generator)
    losses = {}
    for offset in (-0.3, 0.0, 0.3):

        def network(x, t, offset=offset):
            return best(x, t) + offset

        losses[offset] = transport.loss(network, x1, t=t, x0=x0).mean()
    assert losses[0.0] < min(losses[-0.3], losses[0.3])
    assert transport.loss(best, x1, t=t, x0=x0).shape == (4096,)
    low, high = transport.time_range
    assert float(t.min()) >= low and float(t.max()) <= high


def test_loss_weighs_parts_equally():
    sizes = {"xy": (2, 3, 4, 4), "yt": (2, 3, 8, 4)}
    x1 = {name: torch.zeros(size) for name, size in sizes.items()}
    x0 = {name: torch.zeros(size) for name, size in sizes.items()}
    errors = {"xy": 1.0, "yt": 3.0}
    loss = Transport().loss(
        lambda x, t: {name: torch.full_like(v, errors[name]) for name, v in x.items()},
        x1,
        t=torch.tensor([0.1, 0.7]),
        x0=x0,
    )
    assert loss.tolist() == [5.0, 5.0]


# Largest error after 8 steps: Euler is of order 1.
ALLOWED = {"euler": 0.3, "midpoint": 0.02, "heun": 0.04, "rk4": 5e-4, "dopri5": 5e-3}


@pytest.mark.parametrize("method", ODE_METHODS)
@pytest.mark.parametrize("path", PATHS)
def test_flow_arrives_where_it_should(method, path):
    transport, x0 = Transport(path), draw(64, 3)
    options = {"method": method} | ({} if method == "dopri5" else {"num_steps": 8})
    x = sample_ode(transport, exact_network(transport), x0, **options)
    assert float((x - (MEAN + STD * x0)).abs().max()) < ALLOWED[method]
    back = sample_ode(transport, exact_network(transport), x, start=1.0, stop=0.0, **options)
    assert float((back - x0).abs().max()) < 6 * ALLOWED[method]


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)]
)
def test_order_of_fixed_steps(method, order):
    transport, x0 = Transport(), draw(16, 2)
    network = exact_network(transport)
    exact = sample_ode(transport, network, x0, method="rk4", num_steps=400)
    errors = [
        float((sample_ode(transport, network, x0, method=method, num_steps=n) - exact).abs().max())
        for n in (40, 80)
    ]
    # Times are kept in float32, which ends the fall near 1e-7.
    assert errors[0] / errors[1] > 0.8 * 2**order or errors[1] < 2e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_of_16_bits_are_kept_in_32(dtype):
    """A thousand small steps, which 16 bits round away; the network sees the dtype of x0."""
    transport, x0 = Transport(), draw(4000, 1).to(dtype)
    exact = exact_network(transport)

    def network(x, t):
        assert x.dtype == dtype
        return exact(x.double(), t).to(dtype)

    for options in ({"method": "euler", "num_steps": 1000}, {"method": "dopri5"}):
        x = sample_ode(transport, network, x0, **options)
        assert x.dtype == dtype
        assert float((x.double() - (MEAN + STD * x0.double())).abs().max()) < 0.03
    for options in ({}, {"num_steps": 1000, "last_step": None}):
        generator = torch.Generator().manual_seed(1)
        x = sample_sde(transport, network, x0, generator=generator, **options)
        assert x.dtype == dtype
        assert float(x.double().mean()) == pytest.approx(MEAN, abs=0.03)
        assert float(x.double().std()) == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_flow_of_other_predictions(prediction):
    transport, x0 = Transport("linear", prediction), draw(64, 3)
    x = sample_ode(transport, exact_network(transport), x0, method="heun", num_steps=40)
    assert float((x - (MEAN + STD * x0)).abs().max()) < 0.03
    y = sample_sde(
        transport,
        exact_network(transport),
        draw(4000, 1),
        num_steps=60,
        generator=torch.Generator().manual_seed(0),
    )
    assert float(y.mean()) == pytest.approx(MEAN, abs=0.05)


def test_adaptive_solver_meets_its_tolerance():
    transport, x0 = Transport("gvp"), draw(64, 3)
    errors, calls = [], []
    for rtol in (1e-3, 1e-6):
        asked = []
        exact = exact_network(transport)

        def network(x, t, asked=asked, exact=exact):
            asked.append(float(t[0]))
            return exact(x, t)

        x = sample_ode(transport, network, x0, rtol=rtol, atol=rtol * 1e-3)
        errors.append(float((x - (MEAN + STD * x0)).abs().max()))
        calls.append(len(asked))
        assert min(asked) >= 0 and max(asked) <= 1
    assert errors[1] < 1e-5 and errors[1] < errors[0] / 10 and calls[1] > calls[0]


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_diffusion_has_the_distribution_of_the_data(diffusion, method):
    transport = Transport()
    x = sample_sde(
        transport,
        exact_network(transport),
        draw(8000, 1),
        method=method,
        diffusion=diffusion,
        # A last step without noise narrows what still diffuses at its beginning.
        norm={"sbdm": 0.5, "constant": 0.1}.get(diffusion, 1.0),
        num_steps=150,
        generator=torch.Generator().manual_seed(1),
    )
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(x.std()) == pytest.approx(STD, abs=0.04)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", SDE_METHODS)
def test_every_path_prediction_and_diffusion(path, prediction, method):
    transport, x0 = Transport(path, prediction), draw(4000, 1)
    for diffusion in DIFFUSIONS:
        for last_step in LAST_STEPS:
            x = sample_sde(
                transport,
                exact_network(transport),
                x0,
                method=method,
                num_steps=100,
                diffusion=diffusion,
                norm={"sbdm": 0.5, "constant": 0.1}.get(diffusion, 1.0),
                last_step=last_step,
                generator=torch.Generator().manual_seed(1),
            )
            case = f"{diffusion}, {last_step}"
            assert float(x.mean()) == pytest.approx(MEAN, abs=0.05), case
            assert float(x.std()) == pytest.approx(STD, abs=0.06), case


@pytest.mark.parametrize("last_step", [*LAST_STEPS, None])
def test_last_steps(last_step):
    transport = Transport()
    x = sample_sde(
        transport,
        exact_network(transport),
        draw(8000, 1),
        num_steps=200,
        last_step=last_step,
        generator=torch.Generator().manual_seed(1),
    )
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(x.std()) == pytest.approx(STD, abs=0.04)


def test_forms_of_states_agree():
    transport, x0 = Transport(), draw(2, 6, 4)
    network = exact_network(transport)
    halves = {"a": x0[:, :3], "b": x0[:, 3:]}

    def per_part(x, t):
        return map_state(lambda part: network(part, t), x)

    for sample, options in (
        (sample_ode, {"method": "rk4", "num_steps": 3}),
        (sample_sde, {"num_steps": 4, "noise": None}),
    ):
        whole, as_dict, as_tuple = (
            sample(
                transport,
                per_part,
                state,
                **options | ({"noise": fixed_noise(state)} if "noise" in options else {}),
            )
            for state in (x0, halves, tuple(halves.values()))
        )
        assert list(as_dict) == ["a", "b"] and isinstance(as_tuple, tuple)
        torch.testing.assert_close(torch.cat(list(as_dict.values()), 1), whole)
        torch.testing.assert_close(torch.cat(as_tuple, 1), whole)


def fixed_noise(state):
    """Three states of noise that are the same numbers in every form."""
    rows = [draw(2, 6, 4, seed=seed) for seed in range(3)]
    if isinstance(state, torch.Tensor):
        return rows
    split = [{"a": row[:, :3], "b": row[:, 3:]} for row in rows]
    return split if isinstance(state, dict) else [tuple(row.values()) for row in split]


@pytest.mark.parametrize(
    ("sample", "options", "calls"),
    [
        (sample_ode, {"method": "euler", "num_steps": 5}, 5),
        (sample_ode, {"method": "rk4", "num_steps": 5}, 20),
        (sample_sde, {"num_steps": 5}, 5),
        (sample_sde, {"num_steps": 5, "last_step": None}, 5),
        (sample_sde, {"num_steps": 5, "method": "heun"}, 9),
        (sample_sde, {"num_steps": 2}, 2),
        (sample_sde, {"num_steps": 1, "last_step": None}, 1),
    ],
)
def test_one_call_of_the_network_per_drift(sample, options, calls):
    asked = []

    def network(x, t):
        asked.append(t)
        assert t.shape == (2,)
        return torch.zeros_like(x)

    x0 = draw(2, 3)
    kept = x0.clone()
    sample(Transport(), network, x0, **options)
    assert len(asked) == calls and torch.equal(x0, kept)


def test_generator_decides_the_noise():
    transport, x0 = Transport(), draw(2, 3)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample_sde(transport, exact_network(transport), x0, num_steps=5, generator=generator)

    torch.manual_seed(0)
    first = run(4)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1)), "the global generator was used"
    assert torch.equal(first, run(4)) and not torch.equal(first, run(5))
    noise = noise_like({"a": x0}, torch.Generator().manual_seed(1))
    assert list(noise) == ["a"] and noise["a"].dtype == x0.dtype


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Transport("vp"), "path must be one of linear, gvp"),
        (lambda: Transport("linear", "x"), "prediction must be one of"),
        (lambda: sample_ode(Transport(), None, draw(1, 2), method="heun3"), "method must be one"),
        (lambda: sample_ode(Transport(), None, draw(1, 2), num_steps=0), "num_steps must be >= 1"),
        (
            lambda: sample_ode(Transport(), None, draw(1, 2), num_steps=20),
            "num_steps must be left at 50 for dopri5, .* got 20; method='heun' takes 20",
        ),
        (lambda: sample_ode(Transport(), None, draw(1, 2), start=1, stop=1), "two times in"),
        (lambda: sample_sde(Transport(), None, draw(1, 2), diffusion="x"), "diffusion must be one"),
        (lambda: sample_sde(Transport(), None, draw(1, 2), noise=[]), "noise must be 249 states"),
        (
            lambda: sample_sde(Transport(), None, draw(1, 2), num_steps=1),
            "num_steps must be >= 2 with last_step='mean', got 1",
        ),
        (
            lambda: sample_sde(Transport(), None, draw(1, 2), method="heun", last_step=None),
            "last_step must be given for heun",
        ),
        (lambda: map_state(torch.add, draw(1), (draw(1),)), "must have one form"),
        (
            lambda: map_state(torch.add, {"a": draw(2, 3)}, {"a": draw(1, 3)}),
            r"got a dict of a: a tensor \[2, 3\] and a dict of a: a tensor \[1, 3\]",
        ),
        (
            lambda: sample_sde(Transport(), zeros, draw(1, 3), num_steps=3, noise=[draw(4, 3)] * 2),
            r"one form, got a tensor \[1, 3\] and a tensor \[4, 3\]",
        ),
        (lambda: Transport().loss(zeros, draw(2, 3), x0=draw(1, 3)), "must have one form"),
        (lambda: Transport().loss(zeros, draw(2, 3), t=torch.rand(1)), r"t must be \[2\], got"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_times_out_of_range_are_refused(path, prediction):
    transport, x0 = Transport(path, prediction), draw(1, 2)
    singular = {"velocity": (-0.1, 1.1)}.get(prediction, (0.0, 1.0))
    for options in ({"start": singular[0]}, {"stop": singular[1]}, {"start": float("nan")}):
        with pytest.raises(ValueError, match="start, stop two times in"):
            sample_ode(transport, None, x0, method="euler", **options)
    sizes = {"velocity": (0, 1, float("nan"))}.get(prediction, (0, 5e-4, 0.9995))
    for size in sizes:
        with pytest.raises(ValueError, match="last_step_size must be > 0 and end the noisy"):
            sample_sde(transport, None, x0, last_step_size=size)
    with pytest.raises(ValueError, match="last_step_size must be > 0 and end the noisy"):
        sample_sde(transport, None, x0, diffusion="sbdm", last_step_size=0.9995)


@pytest.mark.parametrize(
    ("sample", "options", "message"),
    [
        (sample_sde, {"norm": float("inf")}, "norm must be finite and >= 0, got inf"),
        (sample_sde, {"norm": float("nan")}, "norm must be finite and >= 0, got nan"),
        (sample_sde, {"last_step": None, "last_step_size": 0.1}, "must be left at 0.04 without"),
        (sample_ode, {"method": "heun", "rtol": -5}, "must be left at .* for heun, whose steps"),
        (sample_ode, {"method": "heun", "max_steps": 9}, "must be left at .* and 10000 for heun"),
        (sample_ode, {"max_steps": 0}, "max_steps must be >= 0, > 0 and >= 1, got 0.001, 1e-06"),
    ],
)
def test_options_without_a_meaning_are_refused(sample, options, message):
    with pytest.raises(ValueError, match=message):
        sample(Transport(), None, draw(1, 2), **options)


def test_other_states_and_wild_networks_are_refused():
    with pytest.raises(TypeError, match="x0 must be of floating point, got .torch.int64"):
        sample_ode(Transport(), None, torch.ones(1, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="state must be a tensor, or a tuple or dict of tensors"):
        sample_ode(Transport(), None, [1, 2])
    with pytest.raises(FailedComputationError, match="velocities must be finite"):
        sample_ode(Transport(), lambda x, t: x / 0, draw(1, 2))
