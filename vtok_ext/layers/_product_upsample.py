"""Doubling the frame rate and convolving the result, with half the products.

    P_k[i] = w_k * x[i]                                        one spatial convolution per tap k
    conv(y)[t] = P_0(y[t-2]) + P_1(y[t-1]) + P_2(y[t]) + bias
    y = a x[i-1] + (1 - a) x[i]   =>   P_k(y) = a P_k[i-1] + (1 - a) P_k[i]

Upsampled frames are combinations of the frames before, nearest or linear alike, and a convolution
is linear: three products for every frame of x serve two frames of the result. What is left to do at
the full rate are sums. Source: the layer is `TemporalUpsample`; the rearrangement is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok_ext.layers._frame_pass import FramePass
from vtok_ext.layers.temporal_resample import TemporalUpsample
from vtok_ext.ops._accumulate_cpu import add_conv3d


class ProductUpsample:
    """`TemporalUpsample` frame by frame within a `FramePass`.

    Linear interpolation begins with the single frame that stands for the first segment of a clip,
    and then looks one frame ahead; see `TemporalUpsample`.

    Args:
        run: the pass; its previous state is where a stream goes on, its following one is kept up.
        name: of the layer's state.
        layer: a causal layer without hooks.
        keep_state: whether a state is wanted.
    """

    def __init__(
        self, run: FramePass, name: str, layer: TemporalUpsample, keep_state: bool
    ) -> None:
        self.run, self.name = run, name
        self.linear = layer.interpolation == "linear"
        self.replicate = layer.conv.temporal == "replicate"
        _, self.bias = run.weights(layer.conv)
        self.taps = run.taps(layer.conv)
        self.alpha = float(torch.sigmoid(layer.mix_factor.double()))
        self.started = run.previous is not None
        self.last: Tensor | None = None  # x[i - 1] to interpolate from
        self.last_products: list[Tensor] = []
        self.begun: Tensor | None = None  # two frames of the result, the first one written
        self.keep_state = keep_state
        self.recent: list[Tensor] = []  # the last two frames of y, where the state is wanted
        # P_0(y[t-2]), P_0(y[t-1]) and P_1(y[t-1]) of the next t; None are zeros.
        self.waiting: list[Tensor | None] = [None, None, None]
        self.is_resumed = not self.started

    def num_inputs(self, num_outputs: float) -> float:
        """Returns how many frames of a clip its first `num_outputs` >= 1 depend on."""
        if not self.linear:
            return (num_outputs + 1) // 2
        # One frame alone, one that waits for a second segment, then pairs between neighbours.
        return 1 if num_outputs == 1 else 2 + (num_outputs - 1) // 2

    def _resume(self, x: Tensor) -> None:
        """Goes on where the state of the pass ends, in front of `x`."""
        self.is_resumed = True
        frames = self._before("conv", x, 2)
        first, second = frames[:, :, :1], frames[:, :, 1:]
        self.recent = [first, second]
        self.waiting = [self._product(0, first), self._product(0, second), self._product(1, second)]
        if not self.linear:  # both are the same frame
            self.run.pool.give(self.waiting[0])  # type: ignore[arg-type]
            self.waiting[0] = self.waiting[1]
        elif f"{self.name}.last" in (self.run.previous or {}):
            self.last = self._before("last", x, 1)
            self.last_products = self._products(self.last)

    def _before(self, name: str, x: Tensor, count: int) -> Tensor:
        frames = self.run.before(f"{self.name}.{name}", x, count, count)
        assert frames is not None  # a resumed stream has a state
        return frames.to(self.run.dtype).contiguous(memory_format=torch.channels_last_3d)

    def _product(self, tap: int, x: Tensor) -> Tensor:
        """P_tap of one frame; the bias comes with the last tap."""
        weight = self.taps[tap]
        out = self.run.pool.zeros(weight.shape[0], *x.shape[2:])
        add_conv3d(out, x, weight, self.bias if tap == 2 else None, padding=(0, 1, 1))
        return out

    def _products(self, x: Tensor) -> list[Tensor]:
        return [self._product(tap, x) for tap in range(3)]

    def push(self, x: Tensor) -> Tensor | None:
        """Returns the frames that the next frame `x` [1, C, 1, H, W] makes certain.

        `x` belongs to the layer from here on. The single first frame of a clip comes with the next.
        """
        if not self.is_resumed:
            self._resume(x)
        products, pool = self._products(x), self.run.pool
        if not self.linear:
            return self._repeat(x, products)
        before, before_products = self.last, self.last_products
        if before is None and not self.started:  # all of the first segment
            self.begun = pool.empty(x.shape[1], 2, *x.shape[3:])
            self._emit(self.begun[:, :, :1], x, products, x, products, 1.0)
            pool.give(*products)
            return None
        if before is None:  # the second segment begins
            out = self.begun
            if out is None:
                out = pool.empty(x.shape[1], 1, *x.shape[3:])
            self.begun = None
            self._emit(out[:, :, out.shape[2] - 1 :], x, products, x, products, 1.0)
        else:
            out = pool.empty(x.shape[1], 2, *x.shape[3:])
            for t, share in ((0, 0.25), (1, 0.75)):
                self._emit(out[:, :, t : t + 1], before, before_products, x, products, share)
        self._replace(x, products)
        return out

    def _repeat(self, x: Tensor, products: list[Tensor]) -> Tensor:
        """Returns both frames that y = x gives; the products need no interpolation."""
        pool, (older, _, other) = self.run.pool, self.waiting
        if not self.started and self.replicate:
            older, other = products[0], products[1]
        out = pool.empty(x.shape[1], 2, *x.shape[3:])
        for y, terms in ((out[:, :, :1], (older, other)), (out[:, :, 1:], (older, products[1]))):
            torch.lerp(products[2], x, self.alpha, out=y)
            for term in terms:
                if term is not None:
                    y.add_(term, alpha=1 - self.alpha)
        if self.started:
            pool.give(*self.waiting[1:])  # type: ignore[arg-type]
        pool.give(products[2])
        self.waiting, self.recent = [products[0], products[0], products[1]], [x, x]
        self.started = True
        return out

    def finish(self, final: bool) -> Tensor | None:
        """Returns a frame that waited: for company at the end of a pass, for a neighbour if the
        pass is the `final` one of a clip."""
        if self.begun is not None:
            return self.begun[:, :, :1]
        if self.last is None or not final:
            return None
        out = self.run.pool.empty(self.last.shape[1], 1, *self.last.shape[3:])
        same = self.last, self.last_products
        self._emit(out, *same, *same, 1.0)
        self._replace(None, [])
        return out

    def _replace(self, x: Tensor | None, products: list[Tensor]) -> None:
        self.run.pool.give(*self.last_products)
        self.last, self.last_products = x, products

    def _emit(
        self,
        out: Tensor,  # [1, O, 1, H, W], written
        before: Tensor,  # [1, C, 1, H, W]
        before_products: list[Tensor],
        x: Tensor,  # [1, C, 1, H, W]
        products: list[Tensor],
        share: float,
    ) -> None:
        """Writes the blend for y = (1 - share) before + share x, and moves on by one frame."""
        pool = self.run.pool
        first, second = (pool.empty(*out.shape[1:]) for _ in range(2))
        torch.lerp(before_products[0], products[0], share, out=first)
        torch.lerp(before_products[1], products[1], share, out=second)
        torch.lerp(before_products[2], products[2], share, out=out)
        if not self.started and self.replicate:
            self.waiting = [first, first, second]
        for term in (self.waiting[0], self.waiting[2]):
            if term is not None:
                out.add_(term)
        value = pool.empty(*x.shape[1:])
        torch.lerp(before, x, share, out=value)
        out.lerp_(value, self.alpha)
        self._remember(first, second, value)

    def _remember(self, first: Tensor, second: Tensor, value: Tensor) -> None:
        pool, (oldest, newer, other) = self.run.pool, self.waiting
        if not self.keep_state:
            pool.give(value)
        elif not self.started:
            self.recent = [value if self.replicate else torch.zeros_like(value), value]
        else:
            if self.recent[0] is not self.recent[1]:
                pool.give(self.recent[0])
            self.recent = [self.recent[1], value]
        if self.started:
            if oldest is not None and oldest is not newer:
                pool.give(oldest)
            if other is not None:
                pool.give(other)
        self.waiting = [newer, first, second]
        self.started = True

    def state(self) -> dict[str, Tensor]:
        """Returns the layer's state as `TemporalUpsample` has it, where it is wanted."""
        if not self.keep_state:
            return {}
        state = {f"{self.name}.conv": torch.cat(self.recent, 2)}
        if self.last is not None:
            state[f"{self.name}.last"] = self.last.clone(memory_format=torch.channels_last_3d)
        return state
