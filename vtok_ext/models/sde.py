"""Samplers of the reverse diffusion: the flow's drift, corrected by the score, and fresh noise.

    dx = (v + D(t) s) dt + sqrt(2 D(t)) dW,   s = -x0 / sigma(t)

with the network's velocity v and expected noise x0, from noise (t = 0) to data (t = 1). Any
diffusion D >= 0 leaves the marginals as they are. The last step adds no noise.
Source: SiT (Ma et al., arXiv 2401.08740, sections 2.4 and 3); steps and forms are those of the
reference, specification section 9.3, with one call of the network per drift where it makes two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtok_ext.layers.kl import Generators
from vtok_ext.models.transport import (
    Network,
    State,
    Transport,
    along,
    in_dtype_of,
    in_float32,
    map_state,
    noise_like,
)
from vtok_ext.models.transport import state_parts as parts_of

SDE_METHODS = ("euler", "heun")
DIFFUSIONS = ("sigma", "linear", "decreasing", "increasing_decreasing", "constant", "sbdm")
LAST_STEPS = ("mean", "euler", "tweedie")
_LAST_STEP_SIZE = 0.04  # of the published recipe


@torch.no_grad()
def sample_sde(
    transport: Transport,
    network: Network,
    x0: State,
    *,
    method: str = "euler",
    num_steps: int = 250,
    diffusion: str = "sigma",
    norm: float = 1.0,
    last_step: str | None = "mean",
    last_step_size: float = _LAST_STEP_SIZE,
    generator: Generators = None,
    noise: Sequence[State] | None = None,
) -> State:
    """Returns a sample at t = 1, or without a last step at the end of `transport.time_range`.

    It has the dtype of x0; NaN and infinity of the network are passed on. See Note [Samplers keep
    32 bits] for states of 16 bits.

    Args:
        transport: path and prediction.
        network: called as network(x, t [B]): once per step, twice for heun.
        x0: noise.
        method: "euler" (Euler-Maruyama); or "heun", which adds the noise first and then goes two
            stages.
        num_steps: steps in all, the last one included, hence 2 or more with one; the published
            recipe has 250.
        diffusion: D(t): "sigma", norm sigma(t); "linear", norm (1 - t); "decreasing",
            (norm cos(pi t) + 1)^2 / 4; "increasing_decreasing", norm sin^2(pi t); "constant", norm;
            "sbdm", that of score-based diffusion, norm sigma (alpha' sigma / alpha - sigma').
        norm: factor in it.
        last_step: how the last `last_step_size` is gone without noise: "mean", along the drift;
            "euler", along the velocity; "tweedie", to the expected data at once; None for noisy
            steps all the way.
        last_step_size: its length in time; noisy steps end within `transport.time_range`.
        generator: source of the noise, or one per sample; default torch's global one of the device
            of x0.
        noise: instead, one state as x0 per noisy step.

    Raises:
        ValueError: an unknown choice, too few steps, a norm that is not finite, a last step without
            length, of a length that leaves no time for noisy ones, or a length without one, or Heun
            with velocities to t = 1 without a last step, where the score is infinite.
    """
    _check(method, num_steps, diffusion, norm, last_step, last_step_size)
    noisy = num_steps if last_step is None else num_steps - 1
    first, last = transport.time_range
    if diffusion == "sbdm":  # infinite at noise
        first = max(first, 1e-3)
    end = last if last_step is None else 1 - last_step_size
    if last_step is not None and not (last_step_size > 0 and first < end <= last):
        raise ValueError(
            f"sample_sde: last_step_size must be > 0 and end the noisy steps in ({first:g}, "
            f"{last:g}], got {last_step_size}"
        )
    if last_step is None and method == "heun" and end == 1:
        raise ValueError("sample_sde: last_step must be given for heun, got None")
    if noise is not None and len(noise) != noisy:
        raise ValueError(f"sample_sde: noise must be {noisy} states, got {len(noise)}")
    network, x = in_float32(network, x0)
    drift = _Drift(transport, network, x, diffusion, norm)
    times = torch.linspace(first, end, noisy + 1)
    length = float(times[1] - times[0])
    for i in range(noisy):
        fresh = noise_like(x, generator) if noise is None else noise[i]
        x = _step(drift, x, times[i], length, fresh, method)
    if last_step is not None:
        x = _finished(drift, x, end, last_step, last_step_size)
    return in_dtype_of(x0, x)


def _check(
    method: str,
    num_steps: int,
    diffusion: str,
    norm: float,
    last_step: str | None,
    last_step_size: float,
) -> None:
    for name, value, choices in (
        ("method", method, SDE_METHODS),
        ("diffusion", diffusion, DIFFUSIONS),
        ("last_step", last_step, (*LAST_STEPS, None)),
    ):
        if value not in choices:
            raise ValueError(
                f"sample_sde: {name} must be one of {', '.join(map(str, choices))}, got {value!r}"
            )
    # A last step alone would take noise for the state shortly before t = 1.
    least = 1 if last_step is None else 2
    if num_steps < least:
        raise ValueError(
            f"sample_sde: num_steps must be >= {least} with last_step={last_step!r}, "
            f"got {num_steps}"
        )
    if not 0 <= norm < math.inf:
        raise ValueError(f"sample_sde: norm must be finite and >= 0, got {norm}")
    if last_step is None and last_step_size != _LAST_STEP_SIZE:
        raise ValueError(
            f"sample_sde: last_step_size must be left at {_LAST_STEP_SIZE} without a last step, "
            f"got {last_step_size}"
        )


class _Drift:
    """Drift, velocity and expected noise at a state and one time for the whole batch."""

    def __init__(
        self, transport: Transport, network: Network, state: Any, diffusion: str, norm: float
    ) -> None:
        self.transport, self.network = transport, network
        self.diffusion, self.norm = diffusion, norm
        first = parts_of(state)[0]
        self.batch, self.device = first.shape[0], first.device

    def strength(self, t: Tensor) -> Tensor:
        """Returns D at times t, as t."""
        alpha, sigma, d_alpha, d_sigma = self.transport.coefficients(t)
        if self.diffusion == "sigma":
            return self.norm * sigma
        if self.diffusion == "linear":
            return self.norm * (1 - t)
        if self.diffusion == "decreasing":
            return 0.25 * (self.norm * torch.cos(math.pi * t) + 1) ** 2
        if self.diffusion == "increasing_decreasing":
            return self.norm * torch.sin(math.pi * t) ** 2
        if self.diffusion == "constant":
            return torch.full_like(t, self.norm)
        return self.norm * sigma * (d_alpha * sigma / alpha - d_sigma)

    def predicted(self, x: Any, time: Tensor | float) -> tuple[Any, Tensor]:
        """Returns what the network predicts at x, and the times [B]."""
        t = torch.full((self.batch,), float(time), device=self.device)
        return self.network(x, t), t

    def __call__(self, x: Any, time: Tensor | float) -> Any:
        prediction, t = self.predicted(x, time)
        velocity = self.transport.velocity(prediction, t, x)
        noise = self.transport.noise(prediction, t, x)

        def corrected(v: Tensor, x0: Tensor) -> Tensor:
            at = along(t, v)
            return v - self.strength(at) / self.transport.coefficients(at)[1] * x0

        return map_state(corrected, velocity, noise)


def _step(drift: _Drift, x: Any, time: Tensor, length: float, fresh: Any, method: str) -> Any:
    """Returns the state after a noisy step."""
    scale = (2 * drift.strength(time) * length).sqrt().item()

    def moved(y: Any, rate: Any, share: float = 1.0) -> Any:
        return map_state(lambda a, b: a + share * length * b, y, rate)

    def with_noise(y: Any) -> Any:
        return map_state(lambda a, w: a + scale * w, y, fresh)

    if method == "euler":
        return with_noise(moved(x, drift(x, time)))
    x = with_noise(x)
    rate = drift(x, time)
    second = drift(moved(x, rate), time + length)
    return moved(moved(x, rate, 0.5), second, 0.5)


def _finished(drift: _Drift, x: Any, time: float, last_step: str, length: float) -> Any:
    """Returns the state after a last step without noise."""
    if last_step == "mean":
        rate = drift(x, time)
    else:
        prediction, t = drift.predicted(x, time)
        if last_step == "tweedie":
            return drift.transport.data(prediction, t, x)
        rate = drift.transport.velocity(prediction, t, x)
    return map_state(lambda a, b: a + length * b, x, rate)
