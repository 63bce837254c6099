"""CoordTok: a whole clip as three planes of cells, decoded point by point.

    encoder  a transformer over patches of the clip; learned query tokens read its output and become
             blocks of the planes xy [Rx, Ry, C], yt [Rt, Ry, C] and xt [Rt, Rx, C]
    decoder  per point (t, x, y) the interpolated cells of the three planes and a positional vector,
             a transformer over all points of a call, and a linear layer to the point's patch

Training decodes a random part of the clip: its cost does not grow with the number of frames.
Parameter names and shapes are those of the released weights.
Source: Jang et al., CoordTok (arXiv 2411.14762).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_ext.models import _video_input as video_input
from vtok_ext.models.base import VideoTokenizer
from vtok_ext.models.coordtok_checks import check_planes, check_region, checked_num_frames
from vtok_ext.models.coordtok_config import PLANE_AXES, PRESETS, CoordTokConfig
from vtok_ext.models.coordtok_networks import Decoder, Encoder, Planes
from vtok_ext.models.coordtok_points import (
    Lattice,
    Times,
    locate_times,
    patches_to_video,
    rows_of_points,
    slice_bounds,
)
from vtok_ext.models.encoding import Encoding, Output
from vtok_ext.ops.triplane_gather import triplane_gather

# What frames after the end of a clip hold: -1 where 0 is black and 1 white, hence -3 here.
PADDING_VALUE = -3.0
# A block holds about 12 vectors per point at a time (queries, keys, values, MLP, residuals);
# `decode` takes as many videos at once as keep them within this size.
_VECTORS_PER_POINT, _DECODE_BYTES = 12, 2**31


class CoordTok(VideoTokenizer):
    """Returns a CoordTok; see `VideoTokenizer`.

    The latent of a clip is a dict of planes, channels last: xy [B, Rx, Ry, C], yt [B, Rt, Ry, C],
    xt [B, Rt, Rx, C]; real numbers without bounds. One model describes clips of up to
    `config.video_shape` (T, H, W): missing frames are padding that the encoder knows about, missing
    rows and columns repeat the last one; decoding crops both.

    Slices: the decoder is a transformer over the points of one call, so what is decoded together
    sees each other, and another `num_slices` gives another video. A clip is cut in raster order
    (t, x, y) into slices of nearly equal length. Default is one slice for all, as the released
    examples and the released sampler decode. 1,024 points per slice, 32 slices of 128 frames of
    128x128, are what the reference's function takes by itself and what its training evaluated the
    first step with; the second step with 4,096, 8 slices. Slices of one frame: num_slices=T / dt.
    `frames="reference"` makes all slices equally long as the reference does, and leaves the patches
    after the last one 0.
    """

    config: CoordTokConfig
    config_class = CoordTokConfig
    presets = PRESETS

    def __init__(self, config: CoordTokConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        for plane in PLANE_AXES:
            cells = nn.Parameter(torch.randn(1, *config.plane_shape(plane)))
            self.register_parameter(f"weight_tokens_{plane}", cells)
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    @property
    def is_causal(self) -> bool:
        """False: every cell depends on the whole clip."""
        return False

    @property
    def temporal_factor(self) -> None:
        """None: a latent describes a clip, not a number of frames."""
        return None

    @property
    def spatial_factor(self) -> None:
        """None: as `temporal_factor`."""
        return None

    @property
    def latent_channels(self) -> int:
        """C: numbers per cell."""
        return self.config.latent_channels

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters, to which videos and latents are converted."""
        return next(self.parameters()).dtype

    def token_grid(self, num_frames: int, height: int, width: int) -> tuple[int]:
        """Returns (cells of the three planes,), the same for every clip that the model takes."""
        self.check_clip("token_grid", (num_frames, height, width))
        return (self.config.num_tokens,)

    def run_networks(self, batch: int, num_frames: int, height: int, width: int) -> None:
        """Runs encoder and decoder on clips without meaningful values, padded as by `encode`."""
        video = next(self.parameters()).new_empty(batch, 3, *self.config.video_shape)
        planes = self.encoder(video, self._queries())
        self._decode_clip("run_networks", planes, num_frames, 1, "preserve")

    # Encoding.

    def forward(
        self,
        video: Tensor,
        *,
        points: Tensor | None = None,
        num_frames: Tensor | None = None,
        num_slices: int = 1,
        **options: Any,
    ) -> Output:
        """Returns Output(reconstruction, encoding); the entry for training.

        Args:
            video: [B, 3, T, H, W], float in [-1, 1] or uint8.
            points: which points to decode, [B, N, 3] as in `decode_points`; then the reconstruction
                is their patches [B, N, dt * dx * dy * 3]. Default the whole clip.
            num_frames: real frames of each clip, as in `encode`.
            num_slices: as for `decode`, for the whole clip; 1 with `points`.
            **options: `fps`, `frames` of `encode`.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        if points is not None and num_slices != 1:
            raise ValueError(f"forward: num_slices must be 1 with points, got {num_slices}")
        encoding = self.encode(video, num_frames=num_frames, **options)
        # NaN is found by its loss: training then names the layer that made it.
        planes = self._planes("forward", encoding, finite=False)
        if points is not None:
            return Output(self._decode_points("forward", planes, points), encoding)
        length = encoding.num_frames
        decoded = self._decode_clip("forward", planes, length, num_slices, encoding.frame_rule)
        return Output(self._finish("forward", decoded, length, encoding.size, "float"), encoding)

    def encode(
        self,
        video: Tensor,
        *,
        fps: float | None = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
        num_frames: Tensor | None = None,
        frames: str = "preserve",
        normalize: bool = False,
    ) -> Encoding:
        """Returns the Encoding of a video, whose latent is a dict of planes.

        Args:
            video: [B, 3, T, H, W], float in [-1, 1] or uint8, at most `config.video_shape`.
            fps: frames per second, only recorded; None when unknown.
            sample, generator: without effect, the latent has no distribution.
            num_frames: integers [B] in 1..T, for clips of different length: what comes after them
                is padding, whatever it holds. Default T for all. The Encoding records T alone:
                of clip b, only the first `num_frames[b]` decoded frames mean anything.
            frames: "preserve"; or "reference", which only a clip of the full height and width can
                have, see the class.
            normalize: give the planes mean 0 and std 1 by `latent_statistics`; `decode` knows.

        Raises:
            TypeError, ValueError: the video or an option is not as described; NaN or infinity; no
                statistics for `normalize`.
        """
        video_input.check_video("encode", video)
        video_input.check_frame_rule("encode", frames)
        video_input.check_fps("encode", fps)
        shape, limit = tuple(video.shape[2:]), self.config.video_shape
        self.check_clip("encode", shape)
        if frames == "reference" and shape[1:] != limit[1:]:
            raise ValueError(
                f"encode: video must be {limit[1]}x{limit[2]} with frames='reference', "
                f"got {shape[1]}x{shape[2]}"
            )
        x = video_input.to_float(video, self.dtype)
        x = video_input.repeat_border(x, limit[1] - shape[1], limit[2] - shape[2])
        if num_frames is None and shape[0] < limit[0]:
            num_frames = torch.full((x.shape[0],), shape[0], device=x.device)
        elif num_frames is not None:
            num_frames = checked_num_frames(num_frames, video)
        x = F.pad(x, (0, 0, 0, 0, 0, limit[0] - shape[0]), value=PADDING_VALUE)
        if num_frames is not None:
            real = torch.arange(limit[0], device=x.device) < num_frames[:, None]
            x = torch.where(real[:, None, :, None, None], x, PADDING_VALUE)
        planes = self.encoder(x, self._queries(), num_frames)
        encoding = Encoding(planes, shape[0], (shape[1], shape[2]), fps=fps, frame_rule=frames)
        return self._normalized(encoding, normalize)

    def check_clip(self, op: str, shape: Sequence[int]) -> None:
        """Raises ValueError unless a clip of this shape fits into the model; see the base class."""
        if not self._fits(shape):
            raise ValueError(
                f"{op}: video must have at least one and at most (frames, height, width) "
                f"{self.config.video_shape}, got {tuple(shape)}; cut or resize it first"
            )

    def _fits(self, shape: Sequence[int]) -> bool:
        limit = self.config.video_shape
        return all(1 <= size <= most for size, most in zip(shape, limit, strict=True))

    def _queries(self) -> Planes:
        return {plane: getattr(self, f"weight_tokens_{plane}") for plane in PLANE_AXES}

    # Decoding.

    def decode(  # type: ignore[override]
        self,
        encoding: Encoding | Planes,
        *,
        num_frames: int | None = None,
        size: tuple[int, int] | None = None,
        output: str = "float",
        num_slices: int = 1,
        frames: str | None = None,
        normalize: bool = False,
    ) -> Tensor:
        """Returns the video [B, 3, T, H, W] of an encoding.

        Videos do not see each other: as many at a time as keep activations below 2 GiB, at least
        one.

        Args:
            encoding: an Encoding, or a bare dict of planes.
            num_frames: decode the first T frames only; default and limit what the Encoding records,
                and for bare planes all of the model.
            size: crop to (H, W); default likewise.
            output: "float", nominally in [-1, 1] and not clamped; or "uint8", clamped and rounded.
            num_slices: how many calls of the decoder a clip is cut into; changes the result and the
                memory it takes, see the class.
            frames: "preserve", or "reference" for slices that leave patches out, see the class;
                default what the Encoding records, and "preserve".
            normalize: bare planes are normalised; an Encoding says so itself.

        Raises:
            TypeError, ValueError: an argument is not as described, or asks for more than there is,
                or an Encoding records another model.
        """
        planes = self._planes("decode", encoding, normalize)
        known = self._num_frames(encoding)
        num_frames = known if num_frames is None else num_frames
        if isinstance(encoding, Encoding):
            size = encoding.size if size is None else size
            frames = encoding.frame_rule if frames is None else frames
        frames = "preserve" if frames is None else frames
        video_input.check_frame_rule("decode", frames)
        if not video_input.is_integer(num_frames) or not 1 <= num_frames <= known:
            raise ValueError(
                f"decode: num_frames must be an integer in 1..{known}, got {num_frames}"
            )
        available = (num_frames, *self.config.video_shape[1:])
        self._wanted_shape("decode", available, num_frames, size, output)
        video = self._decode_clip("decode", planes, num_frames, num_slices, frames)
        return self._finish("decode", video, num_frames, size, output)

    def decode_frames(
        self,
        encoding: Encoding | Planes,
        times: Times,
        *,
        size: tuple[int, int] | None = None,
        output: str = "float",
        num_slices: int = 1,
        normalize: bool = False,
    ) -> Tensor:
        """Returns the pictures [B, 3, n, H, W] at some times of the clip, in the order of `times`.

        Only these are computed; they see each other and no other frame, see the class. Slices are
        of the patches that are computed, by the frame rule that the Encoding records.

        Args:
            encoding: as for `decode`.
            times: n numbers of frames from 0 to T - 1, such as [5, 90], with T the frames that the
                Encoding records, and for bare planes those of the model. Numbers that are not
                integers lie between two frames.
            size, output, num_slices, normalize: as for `decode`.

        Raises:
            TypeError, ValueError: as for `decode`.
        """
        picture = self.config.video_shape[1:]
        if size is None and isinstance(encoding, Encoding):
            size = encoding.size
        region, options = (0, 0, *picture), (num_slices, normalize)
        return self._decode_part("decode_frames", encoding, times, region, size, output, *options)

    def decode_region(
        self,
        encoding: Encoding | Planes,
        top: int,
        left: int,
        height: int,
        width: int,
        *,
        times: Times | None = None,
        output: str = "float",
        num_slices: int = 1,
        normalize: bool = False,
    ) -> Tensor:
        """Returns a rectangle of the clip, [B, 3, n, height, width].

        Only the patches that it touches are computed; they see no other, see the class. Slices as
        for `decode_frames`.

        Args:
            encoding: as for `decode`.
            top, left, height, width: the rectangle, in pixels, within the clip.
            times: as for `decode_frames`; default all frames of the clip.
            output, num_slices, normalize: as for `decode`.

        Raises:
            TypeError, ValueError: as for `decode`.
        """
        known = isinstance(encoding, Encoding)
        shape = (
            (encoding.num_frames, *encoding.size)  # type: ignore[union-attr]
            if known
            else self.config.video_shape
        )
        region = (top, left, height, width)
        check_region("decode_region", region, shape[1:])
        times = range(shape[0]) if times is None else times
        options = (num_slices, normalize)
        return self._decode_part("decode_region", encoding, times, region, None, output, *options)

    def decode_points(
        self, encoding: Encoding | Planes, points: Tensor, *, normalize: bool = False
    ) -> Tensor:
        """Returns the patches [B, N, dt * dx * dy * 3] of points that see each other.

        A patch holds its frames, rows, columns and colours in row-major order.

        Args:
            encoding, normalize: as for `decode`.
            points: [B, N, 3] as (t, x, y): integers that count patches; or float32 coordinates in
                [0, 1], patch k of G being k / (G - 1). A coordinate c has the positional vector of
                patch floor(c * (G - 1)), a float32 product that for most G but powers of two falls
                short of some patches; integers are exact. Values outside count as the first or last
                patch.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        planes = self._planes("decode_points", encoding, normalize)
        return self._decode_points("decode_points", planes, points)

    def _decode_points(self, op: str, planes: Planes, points: Tensor) -> Tensor:
        if not isinstance(points, Tensor):
            raise TypeError(f"{op}: points must be a torch.Tensor, got {type(points).__name__}")
        rows = rows_of_points(points, self.config.point_grid())
        return self.decoder(self.point_features(planes, points), rows)

    def point_features(self, planes: Planes, points: Tensor) -> Tensor:
        """Returns the interpolated cells [B, N, 3 C] of points; see `triplane_gather`."""
        grid = None if points.is_floating_point() else self.config.point_grid()
        if planes["xy"].dtype == torch.float64 and grid is None:
            points = points.double()
        return triplane_gather(planes["xy"], planes["yt"], planes["xt"], points, grid=grid)

    def _num_frames(self, encoding: Encoding | Planes) -> int:
        """Returns T of a clip, that of the model when it is not known."""
        known = isinstance(encoding, Encoding)
        return encoding.num_frames if known else self.config.video_shape[0]  # type: ignore[union-attr]

    def _planes(
        self,
        op: str,
        encoding: Encoding | Planes,
        normalize: bool = False,
        *,
        finite: bool = True,
    ) -> Planes:
        """Returns the planes of `encoding`, checked, in the model's dtype."""
        encoding = self._denormalized(encoding, normalize)  # type: ignore[assignment]
        if isinstance(encoding, Encoding):
            self.check_origin(op, encoding.model_id)
            self._check_recorded(op, encoding)
        planes: Any = encoding.latent if isinstance(encoding, Encoding) else encoding
        check_planes(op, planes, self.config, finite=finite)
        return {name: planes[name].to(self.dtype) for name in PLANE_AXES}

    def _check_recorded(self, op: str, encoding: Encoding) -> None:
        """Raises ValueError for a clip that the model cannot have encoded."""
        recorded = (encoding.num_frames, *encoding.size)
        if not self._fits(recorded):
            raise ValueError(
                f"{op}: encoding must record at least one and at most (frames, height, width) "
                f"{self.config.video_shape}, got {recorded}"
            )

    def _lattice(self, moments: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Lattice:
        """Returns the patches at `moments` that touch rows and columns (from, to) of pixels."""
        axes = [moments]
        for (start, stop), size in zip(
            (rows, columns), self.config.dec_patch_size[1:], strict=True
        ):
            axes.append(torch.arange(start // size, -(-stop // size)))
        t, x, y = axes
        return Lattice((t, x, y), self.config.point_grid())

    def _decode_part(
        self,
        op: str,
        encoding: Encoding | Planes,
        times: Times,
        region: tuple[int, ...],  # top, left, height, width
        size: tuple[int, int] | None,
        output: str,
        num_slices: int,
        normalize: bool,
    ) -> Tensor:
        """Returns the region at `times`, cropped to `size`; slices as the Encoding records."""
        top, left, height, width = region
        patch_frames, size_x, size_y = self.config.dec_patch_size
        planes = self._planes(op, encoding, normalize)
        self._wanted_shape(op, (1, height, width), None, size, output)
        rule = encoding.frame_rule if isinstance(encoding, Encoding) else "preserve"
        # What a model makes of times after the end of a clip, no training has looked at.
        limit, known = self.config.video_shape[0], self._num_frames(encoding)
        moments, wanted = locate_times(op, times, limit, patch_frames, known)
        lattice = self._lattice(moments, (top, top + height), (left, left + width))
        video = self._decode_lattice(op, planes, lattice, num_slices, rule)
        top, left = top % size_x, left % size_y
        video = video[:, :, :, top : top + height, left : left + width]
        return self._finish(op, video[:, :, wanted.to(video.device)], None, size, output)

    def _decode_clip(
        self, op: str, planes: Planes, num_frames: int, num_slices: int, frames: str
    ) -> Tensor:
        """Returns the video of the patches that hold the first `num_frames`."""
        _, height, width = self.config.video_shape
        moments = torch.arange(-(-num_frames // self.config.dec_patch_size[0]))
        lattice = self._lattice(moments, (0, height), (0, width))
        return self._decode_lattice(op, planes, lattice, num_slices, frames)

    def _decode_lattice(
        self, op: str, planes: Planes, lattice: Lattice, num_slices: int, frames: str = "preserve"
    ) -> Tensor:
        """Returns the video [B, 3, Nt * dt, Nx * dx, Ny * dy] of a lattice of patches."""
        if not video_input.is_integer(num_slices) or not 1 <= num_slices <= lattice.num_points:
            raise ValueError(
                f"{op}: num_slices must be an integer in 1..{lattice.num_points}, the points, "
                f"got {num_slices}"
            )
        device, real = planes["xy"].device, torch.float32
        if planes["xy"].dtype == torch.float64:
            real = torch.float64
        axes, grid = lattice.coords(real, device)
        rows = lattice.rows(device)
        bounds = slice_bounds(lattice.num_points, num_slices, drop_rest=frames == "reference")
        longest = bounds[0][1] - bounds[0][0]
        bytes_per_point = _VECTORS_PER_POINT * self.config.dec_embed_dim * self.dtype.itemsize
        videos = max(1, _DECODE_BYTES // (bytes_per_point * longest))
        patches = []
        for xy, yt, xt in zip(*(planes[name].split(videos) for name in PLANE_AXES), strict=True):
            features = triplane_gather(xy, yt, xt, axes, grid=grid)
            decoded = [self.decoder(features[:, a:b], rows[a:b]) for a, b in bounds]
            patches.append(torch.cat(decoded, dim=1))
        patch = torch.cat(patches)
        left_out = lattice.num_points - patch.shape[1]
        if left_out:
            patch = F.pad(patch, (0, 0, 0, left_out))
        return patches_to_video(patch, lattice.counts, self.config.dec_patch_size)
