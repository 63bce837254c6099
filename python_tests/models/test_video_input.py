"""Bad videos and latents are refused with the operation, the requirement and what came."""

import pytest
import torch

BAD_VIDEOS = [
    (
        torch.zeros(3, 5, 16, 16),
        ValueError,
        r"video must be \[B, 3, T, H, W\], got \[3, 5, 16, 16\]",
    ),
    (torch.zeros(1, 1, 5, 16, 16), ValueError, r"video must be \[B, 3, T, H, W\], got \[1, 1, 5"),
    (
        torch.zeros(1, 3, 0, 16, 16),
        ValueError,
        "must have at least one clip, frame, row and column",
    ),
    (
        torch.zeros(0, 3, 1, 16, 16),
        ValueError,
        "must have at least one clip, frame, row and column",
    ),
    (torch.zeros(1, 3, 1, 16, 16).int(), TypeError, "floating in .* or uint8, got torch.int32"),
    (torch.zeros(1, 3, 1, 16, 16).bool(), TypeError, "floating in .* or uint8, got torch.bool"),
    (torch.full((1, 3, 1, 16, 16), float("nan")), ValueError, "finite, got NaN or infinite"),
    (torch.full((1, 3, 1, 16, 16), float("inf")), ValueError, "finite, got NaN or infinite"),
    ([[1.0]], TypeError, "video must be a torch.Tensor, got list"),
]


@pytest.mark.parametrize(("video", "error", "message"), BAD_VIDEOS)
def test_bad_videos(model, video, error, message):
    for call in (model.encode, model):
        with pytest.raises(error, match=f"encode: .*{message}"):
            call(video)
    with pytest.raises(error, match=f"stream_encoder.push: .*{message}"):
        model.stream_encoder().push(video)


@pytest.mark.parametrize(
    ("latent", "error", "message"),
    [
        (
            torch.zeros(1, 6, 2, 2),
            ValueError,
            r"latent must be .*\[B, 6, T, H, W\], got \[1, 6, 2, 2\]",
        ),
        (torch.zeros(1, 4, 1, 2, 2), ValueError, r"latent must be .*\[B, 6, T, H, W\], got \[1, 4"),
        (torch.zeros(1, 6, 0, 2, 2), ValueError, "latent must be a non-empty"),
        ("latent", TypeError, "latent must be a torch.Tensor, got str"),
        (torch.full((1, 1, 2, 2), 8**6), ValueError, "262144"),
        (torch.full((1, 1, 2, 2), -1), ValueError, "-1"),
    ],
)
def test_bad_latents(fsq_model, latent, error, message):
    with pytest.raises(error, match=message):
        fsq_model.decode(latent)


def test_bad_options(fsq_model, clip):
    video = clip(1, 1, 8, 8)
    with pytest.raises(
        ValueError, match=r"frames must be one of \('preserve', 'reference'\), got 'x'"
    ):
        fsq_model.encode(video, frames="x")
    with pytest.raises(ValueError, match=r"encode: height and width must be >= 8, got \[7, 16\]"):
        fsq_model.encode(clip(1, 1, 7, 16), frames="reference")
    latent = fsq_model.encode(video).latent
    with pytest.raises(ValueError, match=r"decode: output must be one of .*, got 'int8'"):
        fsq_model.decode(latent, output="int8")
    for options in ({"num_frames": 2}, {"num_frames": 0}, {"size": (9, 8)}, {"size": (8,)}):
        with pytest.raises(
            ValueError, match=r"decode: num_frames and size must be within .* \[1, 8, 8\]"
        ):
            fsq_model.decode(latent, **options)
