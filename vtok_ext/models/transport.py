"""Paths between noise and data, and what a network may predict on them (stochastic interpolants).

    x_t = alpha(t) x1 + sigma(t) x0,   v = alpha'(t) x1 + sigma'(t) x0,   s = -x0 / sigma(t)

x0 is standard normal noise, x1 data, t = 0 noise, t = 1 data. A network predicts the velocity v,
the noise x0 or the score s; each gives the other two. A state is a tensor [B, ...], or a tuple or
dict of such tensors (the planes of a clip). Samplers: `ode`, `sde`.
Source: Albergo et al. (arXiv 2303.08797) and SiT (Ma et al., arXiv 2401.08740, section 2).

Note [Samplers keep 32 bits]

A step adds little to a state, and 16 bits round it away: with the exact network 1,000 Euler steps
in bfloat16 end 3.6 from where they should, 0.002 in float32, and times next to 1 round to 1, where
the score is infinite. Samplers therefore keep a state of 16 bits in float32; the network is still
asked in the dtype of x0, which is that of the result too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from vtok_ext.layers.kl import Generators
from vtok_ext.models._random import normal_like, uniform

State = TypeVar("State", Tensor, tuple[Tensor, ...], dict[str, Tensor])
# Returns what is predicted, in the form of x, at states x and times [B] in [0, 1].
Network = Callable[[Any, Tensor], Any]

PATHS = ("linear", "gvp")
PREDICTIONS = ("velocity", "noise", "score")
# Away from velocities, the velocity is singular at noise (noise prediction, score prediction) and
# the score at data: training and sampling keep this far from both ends. SiT's own number.
_EPS = 1e-3


def map_state(function: Callable[..., Tensor], *states: State) -> State:
    """Returns function(part of each state) for every part, in the form of the states.

    Raises:
        TypeError: a state is neither a tensor nor a tuple or dict of tensors.
        ValueError: the states have different forms, or parts of different shapes.
    """
    first = states[0]
    parts = [state_parts(state) for state in states]
    if any(_shapes(state) != _shapes(first) for state in states[1:]):
        raise ValueError(
            f"transport: states must have one form, got {' and '.join(map(_form, states))}"
        )
    if isinstance(first, dict):
        return {name: function(*(s[name] for s in states)) for name in first}
    done = [function(*part) for part in zip(*parts, strict=True)]
    return done[0] if isinstance(first, Tensor) else tuple(done)


def state_parts(state: State) -> list[Tensor]:
    """Returns the tensors of a state in order. Raises TypeError for anything else."""
    values: list[Any] = [state]
    if isinstance(state, dict):
        values = list(state.values())
    elif isinstance(state, tuple | list):
        values = list(state)
    if not values or not all(isinstance(value, Tensor) for value in values):
        raise TypeError(
            f"transport: state must be a tensor, or a tuple or dict of tensors, got {_form(state)}"
        )
    return values


def _shapes(state: State) -> Any:
    """Returns the shapes of the parts of a state, in its form."""
    if isinstance(state, dict):
        return {name: part.shape for name, part in state.items()}
    return state.shape if isinstance(state, Tensor) else [part.shape for part in state]


def _form(state: Any) -> str:
    if isinstance(state, Tensor):
        return f"a tensor {list(state.shape)}"
    if isinstance(state, dict):
        return "a dict of " + ", ".join(f"{name}: {_form(part)}" for name, part in state.items())
    if isinstance(state, tuple | list):
        return f"a {type(state).__name__} of {', '.join(map(_form, state))}"
    return f"a {type(state).__name__}"


def along(t: Tensor, x: Tensor) -> Tensor:
    """Returns t [B] as a tensor [B, 1, ...] of the rank and dtype of x.

    Raises:
        ValueError: not one time for each sample.
    """
    if t.shape != x.shape[:1]:
        raise ValueError(f"transport: t must be [{x.shape[0]}], got {list(t.shape)}")
    return t.to(x.device, x.dtype).view(-1, *(1,) * (x.dim() - 1))


def noise_like(state: State, generator: Generators = None) -> State:
    """Returns standard normal noise of the form of `state`, drawn part by part.

    Args:
        state: what it is for.
        generator: source, or one per sample, drawn from on its own device and moved: a CPU
            generator gives the same noise on every device. Default torch's global one of the
            state's device.
    """
    return map_state(lambda x: normal_like(x, generator), state)


def in_float32(network: Network, x0: State) -> tuple[Network, State]:
    """Returns network and x0 for a sampler; see Note [Samplers keep 32 bits].

    Raises:
        TypeError: x0 is not of floating point.
    """
    dtypes = [part.dtype for part in state_parts(x0)]
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise TypeError(f"transport: x0 must be of floating point, got {dtypes}")

    def called(x: Any, t: Tensor) -> Any:
        return map_state(_at_least_32_bits, network(in_dtype_of(x0, x), t))

    return called, map_state(_at_least_32_bits, x0)


def in_dtype_of(x0: State, x: State) -> State:
    """Returns x with the dtype of x0."""
    return map_state(lambda part, like: part.to(like.dtype), x, x0)


def _at_least_32_bits(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Transport:
    """A path and what the network predicts on it.

    Attributes:
        path: "linear", alpha = t, sigma = 1 - t; or "gvp", alpha = sin(pi t / 2),
            sigma = cos(pi t / 2), of constant variance.
        prediction: "velocity", "noise" or "score".

    Raises:
        ValueError: another path or prediction.
    """

    path: str = "linear"
    prediction: str = "velocity"

    def __post_init__(self) -> None:
        """Checks both."""
        for name, choices in (("path", PATHS), ("prediction", PREDICTIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"Transport: {name} must be one of {', '.join(choices)}, "
                    f"got {getattr(self, name)!r}"
                )

    @property
    def time_range(self) -> tuple[float, float]:
        """First and last time at which the network is asked: all of [0, 1] for velocities."""
        return (0.0, 1.0) if self.prediction == "velocity" else (_EPS, 1 - _EPS)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns alpha, sigma and their derivatives at times t, each as t."""
        if self.path == "linear":
            return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
        angle, half_pi = t * (math.pi / 2), math.pi / 2
        return angle.sin(), angle.cos(), half_pi * angle.cos(), -half_pi * angle.sin()

    # Training.

    def draw(self, x1: State, generator: Generators = None) -> tuple[Tensor, State]:
        """Returns times t [B], uniform in `time_range`, and noise x0 as x1.

        Noise is drawn before times, times on the CPU or on the generator's device: the order of the
        reference.
        """
        x0 = noise_like(x1, generator)
        first = state_parts(x1)[0]
        low, high = self.time_range
        t = uniform(first.shape[0], generator)
        return (low + (high - low) * t).to(first.device), x0

    def interpolate(self, t: Tensor, x0: State, x1: State) -> State:
        """Returns x_t of noise x0 and data x1 at times t [B]."""

        def between(a: Tensor, b: Tensor) -> Tensor:
            alpha, sigma, _, _ = self.coefficients(along(t, b))
            return alpha * b + sigma * a

        return map_state(between, x0, x1)

    def path_velocity(self, t: Tensor, x0: State, x1: State) -> State:
        """Returns dx_t / dt of noise x0 and data x1 at times t [B]."""

        def rate(a: Tensor, b: Tensor) -> Tensor:
            _, _, d_alpha, d_sigma = self.coefficients(along(t, b))
            return d_alpha * b + d_sigma * a

        return map_state(rate, x0, x1)

    def loss(
        self,
        network: Network,
        x1: State,
        *,
        t: Tensor | None = None,
        x0: State | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Returns the loss [B] of each sample: the mean of the parts' mean squared errors.

        Parts weigh equally, whatever their size. The error is that of the predicted velocity or
        noise; of a predicted score sigma s + x0, which is the noise's error.

        Args:
            network: called once as network(x_t, t).
            x1: data.
            t, x0: times [B] and noise as x1; default `draw`.
            generator: source of what is drawn, or one per sample.
        """
        if t is None or x0 is None:
            drawn_t, drawn_x0 = self.draw(x1, generator)
            t, x0 = drawn_t if t is None else t, drawn_x0 if x0 is None else x0
        predicted = network(self.interpolate(t, x0, x1), t)
        if self.prediction == "velocity":
            target = self.path_velocity(t, x0, x1)
        else:
            target = x0
        if self.prediction == "score":
            predicted = map_state(lambda s: -self.coefficients(along(t, s))[1] * s, predicted)
        errors = map_state(lambda p, y: (p - y).square().flatten(1).mean(1), predicted, target)
        return torch.stack(state_parts(errors)).mean(0)

    # Sampling: one call of the network gives both.

    def velocity(self, prediction: State, t: Tensor, x: State) -> State:
        """Returns the velocity that a prediction at x and times t [B] stands for."""
        if self.prediction == "velocity":
            return prediction

        def rate(x0: Tensor, y: Tensor) -> Tensor:
            alpha, sigma, d_alpha, d_sigma = self.coefficients(along(t, y))
            return d_alpha / alpha * (y - sigma * x0) + d_sigma * x0

        return map_state(rate, self.noise(prediction, t, x), x)

    def noise(self, prediction: State, t: Tensor, x: State) -> State:
        """Returns the expected noise x0 that a prediction at x and times t [B] stands for.

        The score is -x0 / sigma(t).
        """
        if self.prediction == "noise":
            return prediction

        def expected(p: Tensor, y: Tensor) -> Tensor:
            alpha, sigma, d_alpha, d_sigma = self.coefficients(along(t, y))
            if self.prediction == "score":
                return -sigma * p
            return (d_alpha * y - alpha * p) / (d_alpha * sigma - alpha * d_sigma)

        return map_state(expected, prediction, x)

    def data(self, prediction: State, t: Tensor, x: State) -> State:
        """Returns the expected data x1 that a prediction at x and times t [B] stands for."""

        def expected(v: Tensor, y: Tensor) -> Tensor:
            # From both equations of the path, which is regular at t = 0 too.
            alpha, sigma, d_alpha, d_sigma = self.coefficients(along(t, y))
            return (sigma * v - d_sigma * y) / (d_alpha * sigma - alpha * d_sigma)

        return map_state(expected, self.velocity(prediction, t, x), x)
