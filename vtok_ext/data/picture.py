"""PNG files without an imaging library, with small labels: what the demo's comparison needs.

PNG (W3C PNG specification): signature, then chunks [length, type, data, CRC-32]; the image data is
the zlib stream of rows that each begin with a filter byte, 0 for none.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import torch

from .atomic_output import output_file

GLYPH_HEIGHT = 7
_GLYPH_WIDTH = 5
# 5x7 dot matrix letters, one string of hexadecimal digits each: seven rows of two digits, bit 4
# left.
_GLYPHS = {
    " ": "00000000000000",
    "0": "0e11131519110e",
    "1": "040c040404040e",
    "2": "0e11010204081f",
    "3": "1f02040201110e",
    "4": "02060a121f0202",
    "5": "1f101e0101110e",
    "6": "0608101e11110e",
    "7": "1f010204080808",
    "8": "0e11110e11110e",
    "9": "0e11110f01020c",
    ".": "00000000000c0c",
    "-": "0000001f000000",
    "|": "04040404040404",
    "=": "00001f001f0000",
    "a": "0e11111f111111",
    "b": "1e11111e11111e",
    "c": "0e11101010110e",
    "d": "1c12111111121c",
    "e": "1f10101e10101f",
    "f": "1f10101e101010",
    "g": "0e11101711110f",
    "h": "1111111f111111",
    "i": "0e04040404040e",
    "j": "0702020202120c",
    "k": "11121418141211",
    "l": "1010101010101f",
    "m": "111b1515111111",
    "n": "11111915131111",
    "o": "0e11111111110e",
    "p": "1e11111e101010",
    "q": "0e11111115120d",
    "r": "1e11111e141211",
    "s": "0f10100e01011e",
    "t": "1f040404040404",
    "u": "1111111111110e",
    "v": "11111111110a04",
    "w": "11111115151b11",
    "x": "11110a040a1111",
    "y": "11110a04040404",
    "z": "1f01020408101f",
}


def write_png(path: str | Path, image: torch.Tensor) -> None:
    """Returns None when `path` holds the image; an existing file is replaced at that moment.

    Args:
        path: output file.
        image: [3, H, W] uint8 RGB.

    Raises:
        ValueError, TypeError: image is not [3, H, W] uint8, or the path is unusable.
        OSError: writing failed.
    """
    if image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"write_png: image must be [3, H, W], got {list(image.shape)}")
    if image.dtype != torch.uint8:
        raise TypeError(f"write_png: image must be uint8, got {image.dtype}")
    height, width = image.shape[1:]
    rows = torch.zeros(height, 1 + 3 * width, dtype=torch.uint8)
    rows[:, 1:] = image.cpu().permute(1, 2, 0).reshape(height, 3 * width)
    with output_file(path, "write_png") as partial:
        with partial.open("wb") as file:
            file.write(b"\x89PNG\r\n\x1a\n")
            # 8 bits per channel, colour type 2 (RGB), no interlacing.
            file.write(_png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)))
            file.write(_png_chunk(b"IDAT", zlib.compress(rows.numpy().tobytes(), 9)))
            file.write(_png_chunk(b"IEND", b""))


def draw_label(
    image: torch.Tensor,  # [3, H, W] uint8, changed in place
    text: str,
    *,
    top: int,
    left: int,
    colour: tuple[int, int, int] = (235, 235, 235),
    scale: int = 1,
) -> None:
    """Returns None after drawing `text` into the image; what does not fit is cut off.

    Args:
        image: [3, H, W] uint8.
        text: letters (drawn as capitals), digits, space and .-|=; other signs become spaces.
        top, left: position of the first letter's corner, in pixels.
        colour: RGB, 0..255.
        scale: size of one dot, in pixels.
    """
    ink = torch.tensor(colour, dtype=torch.uint8).view(3, 1)
    for i, sign in enumerate(text.lower()):
        mask = _glyph(sign).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        x = left + i * (_GLYPH_WIDTH + 1) * scale
        window = image[:, top : top + mask.shape[0], x : x + mask.shape[1]]
        window[:, mask[: window.shape[1], : window.shape[2]]] = ink


def error_map(
    a: torch.Tensor,  # [3, ..., H, W] uint8
    b: torch.Tensor,  # [3, ..., H, W] uint8
    *,
    full_scale: int = 64,
) -> torch.Tensor:
    """Returns [3, ..., H, W] uint8: mean absolute colour difference, black through red to yellow.

    Args:
        a, b: images or clips of the same shape.
        full_scale: difference (of 255) that is drawn as the brightest colour.
    """
    error = (a.float() - b.float()).abs().mean(0) / full_scale
    # Black, dark red, orange, pale yellow: three ramps one after the other.
    ramps = [(error * 3 - i).clamp(0, 1) for i in range(3)]
    red = 0.75 * ramps[0] + 0.25 * ramps[1]
    green = 0.65 * ramps[1] + 0.35 * ramps[2]
    blue = 0.75 * ramps[2]
    return (torch.stack([red, green, blue]) * 255).round().to(torch.uint8)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _glyph(sign: str) -> torch.Tensor:
    """Returns [7, 5] bool."""
    rows = bytes.fromhex(_GLYPHS.get(sign, _GLYPHS[" "]))
    return torch.tensor([[bool(row >> (4 - x) & 1) for x in range(_GLYPH_WIDTH)] for row in rows])
