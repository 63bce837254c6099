"""FVD and KVD: distances of sets of clips. Their parity with recorded outputs: `parity/`."""

import math

import pytest
import torch

import vtok_ext as vt
from vtok_ext.metrics._clip_set import Origins
from vtok_ext.metrics.frechet import frechet_distance
from vtok_ext.metrics.fvd import frechet_with_interval, fvd_features, fvd_preprocess
from vtok_ext.metrics.i3d import I3D, load_i3d
from vtok_ext.metrics.kvd import FEATURES, NUM_FEATURES, kernel_distance, kvd_features


def normal(n, d, seed, mean=0.0, scale=1.0):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * scale + mean


def clips(n, seed, frames=9, size=16, mean=127.0, scale=30.0):
    x = torch.randn(n, 3, frames, size, size, generator=torch.Generator().manual_seed(seed))
    return (x * scale + mean).clamp(0, 255).to(torch.uint8)


def test_frechet_distance_of_known_normal_distributions():
    """Diagonal covariances: sum of (m1 - m2)^2 + (s1 - s2)^2."""
    whitened = normal(500, 3, 0)
    whitened = whitened - whitened.mean(0)
    factor = torch.linalg.cholesky(torch.linalg.inv(whitened.mT @ whitened / 499))
    exact = whitened @ factor  # mean 0 and covariance 1 to rounding
    a = exact * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([0.0, 1.0, 0.0])
    b = exact * torch.tensor([2.0, 2.0, 0.5])
    expected = 1.0 + (1 - 2) ** 2 + (3 - 0.5) ** 2
    assert float(frechet_distance(a, b)) == pytest.approx(expected, rel=1e-9)
    assert float(frechet_distance(a, a)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_few_samples():
    """Singular covariances, where a Cholesky root does not exist."""
    a, b = normal(5, 40, 0).float(), normal(6, 40, 1).float()
    assert math.isfinite(float(frechet_distance(a, b))) and float(frechet_distance(a, b)) > 0
    torch.testing.assert_close(frechet_distance(a, b), frechet_distance(b, a))


def test_interval_of_frechet_distance():
    a, b = normal(300, 4, 0), normal(300, 4, 1, mean=0.5)
    found = frechet_with_interval(a, b, num_resamples=60)
    assert found.low < found.value < found.high and 0.5 < found.value < 1.6
    assert (found.num_generated, found.num_real) == (300, 300)
    again = frechet_with_interval(a, b, num_resamples=60)
    assert again == found and frechet_with_interval(a, b, seed=1, num_resamples=60) != found
    none = frechet_with_interval(a, b, num_resamples=0)
    assert none.low == none.high == none.value == float(none)


@pytest.mark.parametrize(("count", "shift"), [(30, 0.0), (40, 0.5)])
def test_interval_of_few_samples_covers_what_other_samples_give(count, shift):
    """Fewer samples than make a covariance of full rank, as FVD's 400 features usually have."""
    found = [
        frechet_with_interval(
            normal(count, 50, 2 * i), normal(count, 50, 2 * i + 1, mean=shift), num_resamples=40
        )
        for i in range(40)
    ]
    mean = sum(one.value for one in found) / len(found)
    assert all(one.low <= one.value <= one.high for one in found)
    assert sum(one.low <= mean <= one.high for one in found) >= 36


def test_kernel_distance_is_unbiased_and_tells_sets_apart():
    estimates = [kernel_distance(normal(40, 6, 2 * i), normal(60, 6, 2 * i + 1)) for i in range(60)]
    values = torch.tensor([e.value for e in estimates])
    assert float(values.min()) < 0 < float(values.max())
    assert abs(float(values.mean())) < 3 * float(values.std()) / 60**0.5
    covered = sum(e.low <= 0 <= e.high for e in estimates)
    assert covered >= 50  # 95 % of 60 are 57
    far = kernel_distance(normal(40, 6, 0, mean=2.0), normal(60, 6, 1))
    assert far.low > 0 and far.value > 3 * float(values.abs().max())


@pytest.mark.parametrize("num_real", [4, 16])
def test_kernel_distance_of_few_samples_is_unbiased(num_real):
    values = torch.tensor(
        [
            kernel_distance(normal(8, 6, 2 * i), normal(num_real, 6, 2 * i + 1)).value
            for i in range(500)
        ]
    )
    assert abs(float(values.mean())) < 3 * float(values.std()) / 500**0.5


def mean_over_pairs(x, y, of_x, of_y, other_videos):
    values = [
        float((p @ q / len(p) + 1) ** 3)
        for p, i in zip(x, of_x.tolist(), strict=True)
        for q, j in zip(y, of_y.tolist(), strict=True)
        if i != j or not other_videos
    ]
    return sum(values) / len(values)


def by_hand(x, y, origins):
    """The distance and its jackknife variance, pair by pair."""

    def estimate(x, y, of_x, of_y):
        within = mean_over_pairs(x, x, of_x, of_x, True) + mean_over_pairs(y, y, of_y, of_y, True)
        return within - 2 * mean_over_pairs(x, y, of_x, of_y, origins.paired)

    variance = 0.0
    sides = ((True, True),) if origins.paired else ((True, False), (False, True))
    for sides_left in sides:
        left = []
        for video in (origins.generated if sides_left[0] else origins.real).unique():
            kept = [
                origin != video if is_left else torch.ones_like(origin, dtype=torch.bool)
                for origin, is_left in zip(
                    (origins.generated, origins.real), sides_left, strict=True
                )
            ]
            parts = (x[kept[0]], y[kept[1]], origins.generated[kept[0]], origins.real[kept[1]])
            left.append(estimate(*parts))
        left = torch.tensor(left, dtype=torch.float64)
        variance += float((len(left) - 1) / len(left) * (left - left.mean()).square().sum())
    return estimate(x, y, origins.generated, origins.real), variance


@pytest.mark.parametrize(
    "origins",
    [
        None,
        Origins(torch.tensor([0, 0, 3, 5, 5, 5]), torch.tensor([0, 1, 1, 2, 2])),
        Origins(torch.tensor([0, 0, 1, 4, 4]), torch.tensor([0, 0, 1, 4, 4]), paired=True),
    ],
)
def test_kernel_distance_by_hand(origins):
    length = 5 if origins is None else len(origins.generated)
    x, y = normal(length, 2, 0), normal(5, 2, 1)
    found = kernel_distance(x, y, origins)
    value, variance = by_hand(x, y, origins or Origins.of_clips(5, 5))
    assert found.value == pytest.approx(value)
    assert found.high - found.low == pytest.approx(2 * 1.959964 * variance**0.5)


def test_pairs_do_not_make_a_set_nearer():
    """A tokenizer without loss has distance 0, not one below it."""
    x = normal(12, 6, 0)
    pairs = Origins.of_clips(12, 12, paired=True)
    assert kernel_distance(x, x, pairs).value == pytest.approx(0, abs=1e-9)
    assert kernel_distance(x, x).value < -1
    values = [
        kernel_distance(x + normal(12, 6, 2 * i + 1, scale=1e-3), x, pairs).value
        for i, x in enumerate(normal(12, 6, 2 * i) for i in range(100))
    ]
    assert abs(sum(values) / 100) < 1e-2
    with pytest.raises(ValueError, match="must have a real clip for each generated one"):
        kernel_distance(x, x[:11], Origins.of_clips(12, 11, paired=True))


def test_clips_of_one_video_are_not_independent():
    """Ten videos of eight nearly equal clips each: as 80 samples they look far apart."""
    videos = torch.arange(10).repeat_interleave(8)
    by_video, by_clip = 0, 0
    for i in range(40):
        x, y = (
            normal(10, 6, seed).repeat_interleave(8, 0) + normal(80, 6, seed + 1, scale=0.1)
            for seed in (4 * i, 4 * i + 2)
        )
        found = kernel_distance(x, y, Origins(videos, videos))
        by_video += found.low <= 0 <= found.high
        found = kernel_distance(x, y)
        by_clip += found.low <= 0 <= found.high
    assert by_video >= 34 and by_clip <= 10
    frechet = [
        frechet_with_interval(x, y, origins, num_resamples=60)
        for origins in (None, Origins(videos, videos))
    ]
    assert frechet[0].value == frechet[1].value
    widths = [found.high - found.low for found in frechet]
    assert widths[1] > 2 * widths[0]


def test_sets_of_videos_and_their_clips():
    """Whole videos are samples; of one video its clips are; what is not finite is refused."""
    real, other = clips(4, 0), clips(4, 1)
    cut = vt.metrics.kvd(other, real, clip_frames=3)
    features, real_features = (kvd_features(video, clip_frames=3) for video in (other, real))
    videos = torch.arange(4).repeat(3)
    assert cut == kernel_distance(features, real_features, Origins(videos, videos))
    one = vt.metrics.kvd(other[:1], real, clip_frames=3)
    assert one == kernel_distance(kvd_features(other[:1], clip_frames=3), real_features)
    assert vt.metrics.kvd(real, real, paired=True).value == pytest.approx(0, abs=1e-9)
    broken = torch.zeros(3, 3, 9, 16, 16)
    broken[1, 0, 4, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="kvd: videos must be finite, got NaN or infinity"):
        vt.metrics.kvd(broken, real[:3])


def test_features_see_pictures_motion_and_nothing_random():
    video = clips(4, 0)
    features = kvd_features(video)
    assert features.shape == (4, NUM_FEATURES)
    state = torch.get_rng_state()
    assert torch.equal(features, kvd_features(video)) and torch.equal(state, torch.get_rng_state())
    # Batches change the order of sums in convolutions, nothing more.
    one_by_one = kvd_features(list(video.split(1)), batch_size=1)
    torch.testing.assert_close(one_by_one, features, rtol=0, atol=1e-4)
    still = video[:, :, :1].expand(-1, -1, 9, -1, -1)
    assert not torch.allclose(kvd_features(still), features, rtol=1e-2)
    cut = kvd_features(video, clip_frames=4)
    assert len(cut) == 8 and len(kvd_features(video, clip_frames=4, chunks="first")) == 4
    as_float = video.float() / 127.5 - 1
    torch.testing.assert_close(kvd_features(as_float), features, atol=0.05, rtol=0.05)


def test_features_are_those_of_their_name():
    """Recorded once: KVDs of one name of features can be compared."""
    assert FEATURES == "random-conv3d-2"
    clip = (torch.arange(3 * 5 * 16 * 16) * 37 % 251).to(torch.uint8).view(1, 3, 5, 16, 16)
    features = kvd_features(clip)[0]
    recorded = [
        -0.10847806,
        0.33431731,
        0.61996320,
        0.24150286,
        1.59067777,
        1.01484590,
        -0.56369578,
    ]
    recorded += [-0.42164252, 0.28908454, 1.21056632, -0.62268897, -0.43101004, 0.08520049]
    recorded += [0.25512952]
    expected = torch.tensor(recorded, dtype=torch.float64)
    torch.testing.assert_close(features[::32], expected, rtol=0, atol=1e-4)
    assert float(features.sum()) == pytest.approx(265.10281, abs=0.01)
    assert float(features.square().sum()) == pytest.approx(862.82807, abs=0.05)


def test_kvd_orders_sets():
    real, same, other = clips(24, 0), clips(24, 1), clips(24, 2, scale=60.0)
    near, far = vt.metrics.kvd(same, real), vt.metrics.kvd(other, real)
    assert near.low < 0 < near.high or abs(near.value) < far.value / 50
    assert far.low > near.high and far.num_generated == 24


@pytest.mark.parametrize("sizes", [{"frames": 8}, {"size": 8}])
def test_kvd_of_other_sizes_is_refused(sizes):
    """Its features are those of clips as they are; clips cut to one length can be compared."""
    real, other = clips(3, 0), clips(3, 1, **sizes)
    with pytest.raises(ValueError, match=r"same sizes \(T, H, W\), got .* and \[\(9, 16, 16\)\]"):
        vt.metrics.kvd(other, real)
    if "frames" in sizes:
        assert vt.metrics.kvd(other, real, clip_frames=4).num_real == 6
    pairs = [clips(3, 2), other]
    assert vt.metrics.kvd(pairs, [real, other]).num_generated == 6


class Corners(torch.nn.Module):
    """Stands for I3D, which takes four seconds per clip: means of parts of a clip."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, video):
        assert video.shape[1:] == (3, 16, 224, 224) and float(video.abs().max()) <= 1
        self.seen.append(len(video))
        return torch.nn.functional.adaptive_avg_pool3d(video, (2, 2, 2)).flatten(1) * self.scale


def test_clips_of_fvd():
    """Two clips of 16 frames from every video; the rest is dropped."""
    network = Corners()
    real = torch.cat([clips(1, seed, frames=33, size=24) for seed in range(2)])
    features = fvd_features(real, network)
    assert features.shape == (4, 24) and network.seen == [2, 2]
    assert torch.equal(fvd_features(real, network, chunks="first"), features[:2])
    same = vt.metrics.fvd(real, list(real.split(1)), weights=network, num_resamples=0)
    assert same.value < 1e-9 and same.num_real == 4
    other = vt.metrics.fvd(255 - real, real, weights=network, num_resamples=20)
    assert other.value > 1e-4 and other.low <= other.value <= other.high
    with pytest.raises(ValueError, match="videos must have 16 frames or more"):
        fvd_features(real[:, :, :15], network)
    with pytest.raises(ValueError, match="chunks must be one of"):
        fvd_features(real, network, chunks="some")


class Normalised(Corners):
    """A network whose features, and whose state, depend on its mode."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(24)
        self.frozen = torch.nn.BatchNorm1d(24).eval()

    def forward(self, video):
        return self.frozen(self.norm(super().forward(video)))


def test_fvd_runs_a_network_in_eval_mode():
    """And leaves its modes and buffers as they were, also after an error."""
    network = Normalised()
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    video = clips(3, 0, frames=16, size=24)
    expected = Corners()(fvd_preprocess(video)) / (1 + 1e-5)
    torch.testing.assert_close(fvd_features(video, network), expected.detach(), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="videos must be"):
        vt.metrics.fvd(video, video[0], weights=network)
    assert network.training and network.norm.training and not network.frozen.training
    assert all(torch.equal(value, buffers[name]) for name, value in network.named_buffers())


def test_weights_of_i3d(tmp_path):
    torch.manual_seed(0)
    random_i3d = I3D()
    path = tmp_path / "i3d.pt"
    torch.save(random_i3d.state_dict(), path)
    loaded = load_i3d(path)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in random_i3d.state_dict().items())
    assert not loaded.training
    torch.save({"logits.conv3d.bias": torch.zeros(400)}, path)
    with pytest.raises(ValueError, match="must hold the .* tensors of I3D, got"):
        load_i3d(path)


def test_weights_of_i3d_with_an_old_torch(tmp_path, monkeypatch):
    """They are published as a pickle, which torch < 2.6 reads on one's own risk only."""
    path, network = tmp_path / "i3d.pt", I3D()
    torch.save(network.state_dict(), path)
    monkeypatch.setattr(torch, "__version__", "2.4.1")
    with pytest.raises(ValueError, match=r"^load_i3d: torch must be >= 2\.6 .*trust_checkpoint"):
        load_i3d(path)
    loaded = load_i3d(path, trust_checkpoint=True)
    assert torch.equal(loaded.logits.conv3d.bias, network.logits.conv3d.bias)
    asked = []
    found = vt.metrics.fvd.__globals__  # `vtok_ext.metrics.fvd` is the function, not its module
    monkeypatch.setitem(found, "load_i3d", lambda path, **given: asked.append(given) or Corners())
    video = clips(2, 0, frames=16)
    vt.metrics.fvd(video, video, weights=path, num_resamples=0, trust_checkpoint=True)
    assert asked == [{"trust_checkpoint": True}]


def test_damaged_weights_of_i3d_are_named(tmp_path):
    path = tmp_path / "i3d.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"^load_i3d: .*i3d.pt' must be a checkpoint of tensors"):
        load_i3d(path, trust_checkpoint=True)


def test_fvd_without_weights_says_what_is_missing(tmp_path):
    video = clips(2, 0, frames=16)
    with pytest.raises(ValueError, match="weights must be the file of an I3D with 400"):
        vt.metrics.fvd(video, video)
    with pytest.raises(FileNotFoundError, match="i3d_pretrained_400.pt"):
        vt.metrics.fvd(video, video, weights=tmp_path / "none.pt")


def test_preprocessing_crops_the_centre():
    wide = torch.zeros(1, 3, 2, 56, 112, dtype=torch.uint8)
    wide[..., 28:84] = 255  # the centre square of 56x56
    assert bool((fvd_preprocess(wide)[..., 3:-3] == 1).all())
    assert fvd_preprocess(wide).shape == (1, 3, 2, 224, 224)
    assert fvd_preprocess(wide.transpose(3, 4)).shape == (1, 3, 2, 224, 224)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fvd_preprocess(torch.zeros(1, 3, 2, 8, 8)), TypeError, "must be uint8"),
        (lambda: fvd_preprocess(torch.zeros(3, 2, 8, 8, dtype=torch.uint8)), ValueError, "must be"),
        (lambda: frechet_distance(normal(1, 3, 0), normal(4, 3, 0)), ValueError, "a must be"),
        (lambda: frechet_distance(normal(4, 3, 0), normal(4, 2, 0)), ValueError, "b must be"),
        (lambda: frechet_distance(normal(4, 3, 0), normal(4, 3, 0) / 0), ValueError, "finite"),
        (lambda: kernel_distance(normal(2, 3, 0), normal(4, 3, 0)), ValueError, "at least 3"),
        (lambda: kernel_distance(normal(4, 3, 0) / 0, normal(4, 3, 0)), ValueError, "finite"),
        (lambda: vt.metrics.kvd(clips(3, 0)[0], clips(3, 0)), ValueError, "videos must be"),
        (lambda: vt.metrics.kvd(clips(3, 0).long(), clips(3, 0)), TypeError, "uint8 or floating"),
        (lambda: kvd_features(clips(3, 0), clip_frames=10), ValueError, "as long as a clip"),
        (lambda: kvd_features(clips(3, 0), chunks="x"), ValueError, "chunks must be one of"),
        (lambda: kvd_features(clips(3, 0), clip_frames=0), ValueError, "clip_frames must be >= 1"),
        (lambda: kvd_features(clips(3, 0), batch_size=0), ValueError, "batch_size must be >= 1"),
        (lambda: fvd_features(clips(3, 0), Corners(), batch_size=0), ValueError, "batch_size must"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
