"""Samplers of the probability flow: dx/dt = v(x, t) from noise (t = 0) to data (t = 1).

    x_(n+1) = x_n + h sum_i b_i k_i,   k_i = v(x_n + h sum_j a_ij k_j, t_n + c_i h)

Fixed steps of an explicit Runge-Kutta method, or steps that adapt to an error estimate (Dormand
and Prince, order 5 with Shampine's embedded one of order 4). States are those of `transport`.
Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, sections II.1 to II.5;
Shampine (Math. Comp. 46, 1986). Names and step control are those of the reference's solver,
specification section 9.3, but that the last step ends where the time does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtok_ext.models.failed_computation import FailedComputationError
from vtok_ext.models.transport import (
    Network,
    State,
    Transport,
    in_dtype_of,
    in_float32,
    map_state,
    state_parts,
)


@dataclass(frozen=True)
class _Tableau:
    """Coefficients of an explicit Runge-Kutta method: rows of a, then b, then c."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]


_TABLEAUS = {
    "euler": _Tableau(((),), (1.0,), (0.0,)),
    "midpoint": _Tableau(((), (0.5,)), (0.0, 1.0), (0.0, 0.5)),
    "heun": _Tableau(((), (1.0,)), (0.5, 0.5), (0.0, 1.0)),
    # Kutta's 3/8 rule.
    "rk4": _Tableau(
        ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
        (0.0, 1 / 3, 2 / 3, 1.0),
    ),
}
_DORMAND_PRINCE = _Tableau(
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
)
# b of Shampine's embedded method of order 4.
_LOWER_ORDER = (
    1951 / 21600,
    0.0,
    22642 / 50085,
    451 / 720,
    -12231 / 42400,
    649 / 6300,
    1 / 60,
)
# Step control: how much of the step that would just do is taken, and how much one may change.
_SAFETY, _LARGEST_GROWTH, _LARGEST_CUT = 0.9, 10.0, 0.2
_DEFAULT_STEPS = 50  # SiT's own number
_RTOL, _ATOL, _MAX_STEPS = 1e-3, 1e-6, 10_000
ODE_METHODS = (*_TABLEAUS, "dopri5")


@torch.no_grad()
def sample_ode(
    transport: Transport,
    network: Network,
    x0: State,
    *,
    method: str = "dopri5",
    num_steps: int = _DEFAULT_STEPS,
    start: float | None = None,
    stop: float | None = None,
    rtol: float = _RTOL,
    atol: float = _ATOL,
    max_steps: int = _MAX_STEPS,
) -> State:
    """Returns the state at time `stop` of the flow that is at x0 at time `start`, in its dtype.

    With fixed steps NaN and infinity of the network are passed on. See Note [Samplers keep 32 bits]
    for states of 16 bits.

    Args:
        transport: path and prediction.
        network: called as network(x, t [B]), once per stage.
        x0: noise, or with start > stop data that the flow turns into noise.
        method: "euler", "midpoint", "heun" (order 2), "rk4" or the adaptive "dopri5".
        num_steps: of equal length; not for dopri5, which chooses its own.
        start, stop: within `transport.time_range`, by default its ends.
        rtol, atol: of dopri5: a step is taken when the root mean square of
            error / (atol + rtol |x|) is at most 1 in every part of the state, over the whole batch:
            a sample depends on the others of its batch, within this tolerance.
        max_steps: of dopri5, accepted or not.

    Raises:
        ValueError: an unknown method, num_steps < 1 or for dopri5, times out of range or a start
            that is the stop, or rtol, atol or max_steps that are negative or for fixed steps.
        RuntimeError: dopri5 does not arrive, because the network is not smooth or not finite.
    """
    first, last = transport.time_range
    start, stop = first if start is None else start, last if stop is None else stop
    if method not in ODE_METHODS:
        raise ValueError(
            f"sample_ode: method must be one of {', '.join(ODE_METHODS)}, got {method!r}"
        )
    if num_steps < 1 or not first <= min(start, stop) < max(start, stop) <= last:
        raise ValueError(
            f"sample_ode: num_steps must be >= 1 and start, stop two times in [{first:g}, "
            f"{last:g}], got {num_steps}, {start} and {stop}"
        )
    network, x = in_float32(network, x0)
    field = _Field(transport, network, x)
    if method == "dopri5":
        if num_steps != _DEFAULT_STEPS:
            raise ValueError(
                f"sample_ode: num_steps must be left at {_DEFAULT_STEPS} for dopri5, which chooses "
                f"its steps by rtol and atol, got {num_steps}; method='heun' takes {num_steps}"
            )
        if not (rtol >= 0 and atol > 0 and max_steps >= 1):
            raise ValueError(
                f"sample_ode: rtol, atol and max_steps must be >= 0, > 0 and >= 1, "
                f"got {rtol}, {atol} and {max_steps}"
            )
        return in_dtype_of(x0, _adaptive(field, x, start, stop, rtol, atol, max_steps))
    if (rtol, atol, max_steps) != (_RTOL, _ATOL, _MAX_STEPS):
        raise ValueError(
            f"sample_ode: rtol, atol and max_steps must be left at {_RTOL:g}, {_ATOL:g} and "
            f"{_MAX_STEPS} for {method}, whose steps are fixed, got {rtol}, {atol} and {max_steps}"
        )
    # Times as a float32 grid, each step from one to the next: what the reference evaluates at.
    times = torch.linspace(start, stop, num_steps + 1).tolist()
    for now, after in zip(times, times[1:], strict=False):
        tableau, step = _TABLEAUS[method], after - now
        x = _combined(x, step, tableau.b, _stages(field, tableau, x, now, step))
    return in_dtype_of(x0, x)


class _Field:
    """The velocity of a network at a state and one time for the whole batch."""

    def __init__(self, transport: Transport, network: Network, state: Any) -> None:
        self.transport, self.network = transport, network
        first = state_parts(state)[0]
        self.batch, self.device = first.shape[0], first.device

    def __call__(self, x: Any, time: float) -> Any:
        t = torch.full((self.batch,), time, device=self.device)
        return self.transport.velocity(self.network(x, t), t, x)


def _combined(x: Any, step: float, weights: tuple[float, ...], rates: list[Any]) -> Any:
    """Returns x + step * sum of weights * rates."""
    used = [(weight, rate) for weight, rate in zip(weights, rates, strict=False) if weight]
    if not used:
        return x

    def add(y: Tensor, *parts: Tensor) -> Tensor:
        total = parts[0] * (used[0][0] * step)
        for (weight, _), part in zip(used[1:], parts[1:], strict=True):
            total = torch.add(total, part, alpha=weight * step)
        return y + total

    return map_state(add, x, *(rate for _, rate in used))


def _stages(
    field: Any, tableau: _Tableau, x: Any, time: float, step: float, first: Any = None
) -> list[Any]:
    """Returns the rates k_i of a step; `first` is k_1 if it is known."""
    rates = [field(x, time) if first is None else first]
    for row, c in zip(tableau.a[1:], tableau.c[1:], strict=True):
        rates.append(field(_combined(x, step, row, rates), time + c * step))
    return rates


def _adaptive(
    field: _Field, x: Any, start: float, stop: float, rtol: float, atol: float, max_steps: int
) -> Any:
    """Returns the state at `stop`, which the last step is cut to reach: no time is outside.

    A direction of -1 turns the problem into one of growing time.
    """
    sign = 1.0 if stop > start else -1.0

    def forward(y: Any, time: float) -> Any:
        velocity = field(y, sign * time)
        return velocity if sign > 0 else map_state(torch.neg, velocity)

    time, end = sign * start, sign * stop
    rate = forward(x, time)
    step = _first_step(forward, x, rate, time, end - time, rtol, atol)
    weights = tuple(b - lower for b, lower in zip(_DORMAND_PRINCE.b, _LOWER_ORDER, strict=True))
    for _ in range(max_steps):
        arrives = time + step >= end
        step = min(step, end - time)
        rates = _stages(forward, _DORMAND_PRINCE, x, time, step, rate)
        after = _combined(x, step, _DORMAND_PRINCE.b, rates)
        error = _combined(map_state(torch.zeros_like, x), step, weights, rates)
        ratio = _size(error, x, after, rtol, atol)
        if not ratio < float("inf"):
            raise _not_finite(time)
        if ratio <= 1:
            if arrives:
                return after
            time, x, rate = time + step, after, rates[-1]
        step *= _change(ratio)
    raise FailedComputationError(
        f"sample_ode: dopri5 must arrive within {max_steps} steps, got to {time:g}"
    )


def _not_finite(time: float) -> FailedComputationError:
    return FailedComputationError(
        f"sample_ode: velocities must be finite, got NaN or infinity from |t| = {abs(time):g} on"
    )


def _change(ratio: float) -> float:
    """Returns the factor of the next step after one with this error ratio."""
    if ratio == 0:
        return _LARGEST_GROWTH
    cut = 1.0 if ratio < 1 else _LARGEST_CUT
    return min(_LARGEST_GROWTH, max(_SAFETY / ratio ** (1 / 5), cut))


def _size(value: Any, x: Any, other: Any, rtol: float, atol: float) -> float:
    """Returns the largest root mean square of value / tolerance over the parts of a state."""

    def rms(part: Tensor, a: Tensor, b: Tensor) -> Tensor:
        tolerance = atol + rtol * torch.maximum(a.abs(), b.abs())
        return (part / tolerance).square().mean().sqrt()

    return max(float(p) for p in state_parts(map_state(rms, value, x, other)))


def _first_step(
    field: Any, x: Any, rate: Any, time: float, length: float, rtol: float, atol: float
) -> float:
    """Returns a first step from the sizes of x, its rate and the change of the rate."""
    size, slope = (_size(value, x, x, rtol, atol) for value in (x, rate))
    if not slope < float("inf"):
        raise _not_finite(time)
    trial = 1e-6 if size < 1e-5 or slope < 1e-5 else min(length, 0.01 * size / slope)
    next_rate = field(_combined(x, trial, (1.0,), [rate]), time + trial)
    bend = _size(map_state(torch.sub, next_rate, rate), x, x, rtol, atol) / trial
    if slope <= 1e-15 and bend <= 1e-15:
        step = max(1e-6, trial * 1e-3)
    else:
        step = (0.01 / max(slope, bend)) ** (1 / 5)
    return min(100 * trial, step)
