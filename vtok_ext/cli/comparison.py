"""The picture `comparison.png`: input, output and error map in rows, a few moments in columns."""

from __future__ import annotations

import torch

from vtok_ext.data.picture import GLYPH_HEIGHT, draw_label, error_map

_COLUMNS = 5
_GAP = 4
_LABEL_WIDTH = 44
_LABEL_HEIGHT = GLYPH_HEIGHT + 5
# Small clips are shown with every pixel as a square of whole pixels, so that nothing is smoothed
# over.
_COMFORTABLE_HEIGHT = 192
_ERROR_FULL_SCALE = 64


def enlarged(frames: torch.Tensor) -> torch.Tensor:
    """Returns [3, T, k H, k W]: every pixel k x k times, k H near 192 and k at least 1."""
    factor = max(1, _COMFORTABLE_HEIGHT // frames.shape[2])
    return frames.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def comparison_picture(
    source: torch.Tensor,  # [3, T, H, W] uint8
    output: torch.Tensor,  # [3, T, H, W] uint8
    seconds: list[float],
) -> torch.Tensor:
    """Returns [3, H', W'] uint8 with labelled rows "input", "output" and "error".

    Args:
        source, output: [3, T, H, W] uint8.
        seconds: time of each frame, for the column titles.
    """
    count = min(_COLUMNS, source.shape[1])
    moments = torch.linspace(0, source.shape[1] - 1, count).round().long()
    shown_source, shown_output = source[:, moments], output[:, moments]
    rows = {
        "input": shown_source,
        "output": shown_output,
        "error": error_map(shown_source, shown_output, full_scale=_ERROR_FULL_SCALE),
    }
    return labelled_rows(rows, [f"{seconds[moment]:.2f} s" for moment in moments.tolist()])


def labelled_rows(rows: dict[str, torch.Tensor], titles: list[str]) -> torch.Tensor:
    """Returns [3, H', W'] uint8: one row of pictures per name, one column per title.

    Args:
        rows: name -> [3, N, H, W] uint8, small ones are enlarged.
        titles: N texts above the columns.
    """
    rows = {name: enlarged(row) for name, row in rows.items()}
    height, width = next(iter(rows.values())).shape[2:]
    label_width = max(_LABEL_WIDTH, 8 + 6 * max(len(name) for name in rows))
    canvas = torch.full(
        (
            3,
            _LABEL_HEIGHT + len(rows) * (height + _GAP),
            label_width + len(titles) * (width + _GAP),
        ),
        24,
        dtype=torch.uint8,
    )
    for column, title in enumerate(titles):
        left = label_width + column * (width + _GAP)
        draw_label(canvas, title, top=2, left=left)
        for i, row in enumerate(rows.values()):
            top = _LABEL_HEIGHT + i * (height + _GAP)
            canvas[:, top : top + height, left : left + width] = row[:, column]
    for i, name in enumerate(rows):
        draw_label(canvas, name, top=_LABEL_HEIGHT + i * (height + _GAP) + height // 2, left=4)
    return canvas
