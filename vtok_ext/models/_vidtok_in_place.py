"""VidTok's encoder and decoder without gradients on a CPU, level by level in chunks of frames.

    encode   each level runs through its clip chunk by chunk; what it halves is collected whole
    decode   a chunk is pushed through a level and on into the next one, up to its pixels

Layers, buffers and conditions are those of Note [Passes in place]; results and states are those of
`Encoder.forward` and `Decoder.forward`. Weights of the low levels outweigh their activations, so
that these run whole; at full resolution a chunk is a few frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtok_ext.layers._frame_pass import FramePass, runs_in_place
from vtok_ext.layers._product_upsample import ProductUpsample
from vtok_ext.layers._state import State, owned
from vtok_ext.ops._dtypes import autocast_dtype, without_autocast
from vtok_ext.ops.temporal_resample import temporal_downsample_blend

if TYPE_CHECKING:
    from vtok_ext.models.vidtok import Decoder, Encoder, Middle

_LAYOUT = torch.channels_last_3d


def applies(network: nn.Module, x: Tensor, state: State | None, containers: set[type]) -> bool:
    """Returns whether a pass of a causal network may run in place.

    A stream that has not begun, or that stopped within the first segment of linear interpolation,
    goes the ordinary way.
    """
    if state is not None and any(v.numel() == 0 or k.endswith(".first") for k, v in state.items()):
        return False
    return runs_in_place(network, x, containers)


def each_item(
    run: Callable[[FramePass, Tensor], Tensor],
    x: Tensor,  # [B, C, T, H, W]
    state: State | None,
    return_state: bool,
) -> Any:
    """Returns `run` of every item of a batch joined, or `(result, state)`."""
    dtype = autocast_dtype("cpu") or x.dtype
    in_place = FramePass(dtype)
    results, states = [], []
    with without_autocast("cpu"):
        for i in range(x.shape[0]):
            in_place.begin(None if state is None else {k: v[i : i + 1] for k, v in state.items()})
            results.append(run(in_place, x[i : i + 1].to(dtype)))
            states.append(in_place.state() if return_state else {})
    if len(results) == 1:
        return (results[0], states[0]) if return_state else results[0]
    joined = torch.cat(results)
    if not return_state:
        return joined
    return joined, {name: torch.cat([s[name] for s in states]) for name in states[0]}


def _middle(run: FramePass, middle: Middle, x: Tensor) -> None:
    run.temporal_block("mid.block_1", middle.block_1, x)
    run.attention(middle.attn_1, x)
    run.temporal_block("mid.block_2", middle.block_2, x)


def _conv_in(run: FramePass, network: Encoder | Decoder, x: Tensor) -> Tensor:
    """Returns `x` behind the front frames of the first convolution."""
    conv: Any = network.conv_in
    padded = conv.pad(x, run.before("conv_in", x, 2, 2))
    run.following["conv_in"] = owned(padded[:, :, padded.shape[2] - 2 :])
    return padded.contiguous(memory_format=_LAYOUT)


def _conv_out(run: FramePass, network: Encoder | Decoder, x: Tensor, out: Tensor) -> None:
    """Writes the last convolution's result to `out` [1, O, T, H, W], T <= frames of `x`."""
    conv: Any = network.conv_out
    h = run.norm_with_front("conv_out", network.norm_out, conv, x)  # type: ignore[arg-type]
    if out.shape[2]:
        run.add_conv(out.zero_(), h[:, :, h.shape[2] - 2 - out.shape[2] :], conv)


def _blocks(run: FramePass, name: str, space: Any, time: Any, x: Tensor) -> Tensor:
    """Returns the output of a level's blocks: `x` itself, overwritten, or another buffer."""
    first = x
    for i, (block_2d, block_1d) in enumerate(zip(space.block, time.block, strict=True)):
        y = run.block_2d(block_2d, x)
        if y is not x and x is not first:
            run.pool.give(x)
        run.temporal_block(f"{name}.block.{i}", block_1d, y)
        x = y
    return x


def _video(run: FramePass, channels: int, shape: tuple[int, ...]) -> Tensor:
    size = (1, channels, *shape)
    return torch.empty(size, dtype=run.dtype, device="cpu", memory_format=_LAYOUT)


class EncoderPass:
    """`Encoder.forward` of one item.

    Args:
        encoder: the network.
        first_alone: whether the first frame of a clip stands for its copies, see `Encoder`.
        keep_state: whether a state is wanted.
    """

    def __init__(self, encoder: Encoder, first_alone: bool, keep_state: bool) -> None:
        self.encoder, self.first_alone, self.keep_state = encoder, first_alone, keep_state

    def __call__(self, run: FramePass, x: Tensor) -> Tensor:
        """Returns the raw latent of x [1, C, T, H, W]."""
        encoder = self.encoder
        x = _conv_in(run, encoder, x)
        for level in range(len(encoder.down)):
            # Only `x` keeps a whole clip alive from here on: of each level, until the next is done.
            x = self._level(run, level, x)
            x = self._halve_time(run, level, x)
        _middle(run, encoder.mid, x)
        weight, _ = run.weights(encoder.conv_out)
        out = _video(run, weight.shape[0], tuple(x.shape[2:]))
        _conv_out(run, encoder, x, out)
        return out

    def _level(self, run: FramePass, level: int, before: Tensor) -> Tensor:
        """Returns the output of a level but for its halving in time, for whose front frames it has
        room.

        Args:
            run: the pass.
            level: of the encoder.
            before: the output of the level before, which is overwritten; of the first level the
                video behind its front frames.
        """
        space: Any = self.encoder.down[level]
        time: Any = self.encoder.down_temporal[level]
        width, name = space.block[0].conv1.out_channels, f"down_temporal.{level}"
        height, width_px = before.shape[3:]
        num_frames = before.shape[2] - (2 if level == 0 else 0)
        front = 0 if time.downsample is None else self._front(run, f"{name}.downsample")
        halved = (height // 2, width_px // 2) if space.downsample is not None else before.shape[3:]
        chunk = run.num_frames(width, height, width_px)
        if space.downsample is None and not front and chunk >= num_frames:
            out = _blocks(run, name, space, time, self._input(run, level, before, 0, num_frames))
        else:
            out = run.pool.empty(width, front + num_frames, *halved)
            for start in range(0, num_frames, chunk):
                stop = min(start + chunk, num_frames)
                x = self._input(run, level, before, start, stop)
                y = _blocks(run, name, space, time, x)
                target = out[:, :, front + start : front + stop]
                if space.downsample is None:
                    target.copy_(y)
                else:
                    run.space_down(target.zero_(), space.downsample, y)
                if y is not x:
                    run.pool.give(y)
                if level == 0:  # further levels are given slices
                    run.pool.give(x)
        run.release(f"{name}.block.", self.keep_state)
        run.pool.let_go(before)
        return out

    def _input(self, run: FramePass, level: int, before: Tensor, start: int, stop: int) -> Tensor:
        """Returns frames [start, stop) of a level's input, to be overwritten."""
        if level > 0:
            return before[:, :, start:stop]
        weight, _ = run.weights(self.encoder.conv_in)
        y = run.pool.zeros(weight.shape[0], stop - start, *before.shape[3:])
        run.add_conv(y, before[:, :, start : stop + 2], self.encoder.conv_in)
        return y

    def _front(self, run: FramePass, name: str) -> int:
        """Returns how many frames precede the input of a temporal halving."""
        if run.previous is not None and name in run.previous:
            return run.previous[name].shape[2]
        return 2 if self.first_alone else 1

    def _halve_time(self, run: FramePass, level: int, padded: Tensor) -> Tensor:
        """Returns half as many frames where the level does that; writes the front frames of
        `padded`."""
        layer: Any = self.encoder.down_temporal[level].downsample
        if layer is None:
            return padded
        name = f"down_temporal.{level}.downsample"
        front, before = self._front(run, name), run.before(name, padded, 1, 2)
        if before is not None:
            padded[:, :, :front] = before
        elif layer.conv.temporal == "replicate":
            padded[:, :, :front] = padded[:, :, front : front + 1]
        else:
            padded[:, :, :front] = 0
        count = max(0, (padded.shape[2] - 1) // 2)
        if self.keep_state:
            run.following[name] = owned(padded[:, :, 2 * count :])
        y = run.pool.zeros(padded.shape[1], count, *padded.shape[3:])
        if count:
            run.add_conv(y, padded, layer.conv, (2, 1, 1))
        halved = temporal_downsample_blend(padded, y, layer.mix_factor, padding="none")
        run.pool.give(padded, y)
        return halved


class DecoderPass:
    """`Decoder.forward` of one item.

    Args:
        decoder: the network.
        drop: how many frames at the beginning are not wanted.
        final: whether the clip ends with this chunk.
        num_frames: how many frames of a whole clip are wanted behind those; None: all.
    """

    def __init__(
        self, decoder: Decoder, drop: int, final: bool, num_frames: int | None = None
    ) -> None:
        self.decoder, self.drop, self.final = decoder, drop, final
        self.num_frames = num_frames

    def __call__(self, run: FramePass, x: Tensor) -> Tensor:
        """Returns the frames of a latent x [1, C, T, H, W]."""
        decoder = self.decoder
        padded = _conv_in(run, decoder, x)
        weight, _ = run.weights(decoder.conv_in)
        x = run.pool.zeros(weight.shape[0], *x.shape[2:])
        run.add_conv(x, padded, decoder.conv_in)
        _middle(run, decoder.mid, x)
        self.upsamplers = self._upsamplers(run)
        self.missing = self._wanted()
        self.parts: list[Tensor] = []
        self.num_skipped = 0
        self._push(run, len(decoder.up) - 1, x)
        for level in sorted(self.upsamplers, reverse=True):
            upsampler = self.upsamplers[level]
            rest = upsampler.finish(self.final)
            if rest is not None:
                self._push(run, level - 1, rest)
                run.pool.give(rest)
            run.following.update(upsampler.state())
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, 2)

    def _upsamplers(self, run: FramePass) -> dict[int, ProductUpsample]:
        layers: Any = [(i, stage.upsample) for i, stage in enumerate(self.decoder.up_temporal)]
        return {
            i: ProductUpsample(run, f"up_temporal.{i}.upsample", layer, not self.final)
            for i, layer in layers
            if layer is not None
        }

    def _wanted(self) -> list[float]:
        """Returns how many frames each level must be given."""
        wanted = math.inf if self.num_frames is None else self.drop + self.num_frames
        counts = []
        for level in range(len(self.decoder.up)):
            if level in self.upsamplers:
                wanted = self.upsamplers[level].num_inputs(wanted)
            counts.append(wanted)
        return counts

    def _push(self, run: FramePass, level: int, x: Tensor) -> None:
        """Sends frames, which are overwritten, through `level` and what follows."""
        if level < 0:
            self._finish(run, x)
            return
        if x.shape[2] > self.missing[level]:  # frames that only pad the clip
            x = x[:, :, : int(self.missing[level])]
        self.missing[level] -= x.shape[2]
        space: Any = self.decoder.up[level]
        time: Any = self.decoder.up_temporal[level]
        chunk = run.num_frames(space.block[0].conv1.in_channels, *x.shape[3:])
        for part in x.split(chunk, 2) if x.shape[2] else ():
            y = _blocks(run, f"up_temporal.{level}", space, time, part)
            if space.upsample is None:
                self._push(run, level - 1, y)
            elif level in self.upsamplers:
                for frame in y.split(1, 2):
                    doubled = self.upsamplers[level].push(run.space_up(space.upsample, frame))
                    if doubled is not None:
                        self._push(run, level - 1, doubled)
                        run.pool.give(doubled)
            else:
                self._push(run, level - 1, run.space_up(space.upsample, y))
            if y is not part:
                run.pool.give(y)

    def _finish(self, run: FramePass, x: Tensor) -> None:
        """Makes pixels of frames; those to drop only leave their traces in the buffer."""
        skipped = min(self.drop - self.num_skipped, x.shape[2])
        self.num_skipped += skipped
        weight, _ = run.weights(self.decoder.conv_out)
        out = _video(run, weight.shape[0], (x.shape[2] - skipped, *x.shape[3:]))
        _conv_out(run, self.decoder, x, out)
        self.parts.append(out)
