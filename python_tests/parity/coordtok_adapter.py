"""Adapter between the recorded outputs of the CoordTok reference and this package's tokenizer,
generator and metrics.

Run by `check_coordtok.py DATA_DIR --adapter coordtok_adapter.py`, whose docstring defines the
methods. The reference's videos, slices and masks are those that the options used here name.
"""

import torch
from torch import Tensor

from vtok_ext.metrics.frechet import frechet_distance
from vtok_ext.metrics.fvd import fvd_preprocess
from vtok_ext.metrics.i3d import I3D
from vtok_ext.models import CoordTok, CoordTokConfig, Encoding
from vtok_ext.models.coordtok_config import PLANE_AXES
from vtok_ext.models.coordtok_sampling import random_frame_points, random_points, video_patches
from vtok_ext.models.latent_statistics import LatentStatistics, StatisticsCounter
from vtok_ext.models.ode import sample_ode
from vtok_ext.models.sde import sample_sde
from vtok_ext.models.sit import SiT
from vtok_ext.models.sit_config import SiTConfig
from vtok_ext.models.transport import Transport

SAME = ("video_shape", "enc_embed_dim", "enc_num_layers", "enc_num_heads", "enc_patch_num_layers")
SAME += ("dec_embed_dim", "dec_num_layers", "dec_num_heads")


def build_config(cfg: dict) -> CoordTokConfig:
    """Returns our configuration of the reference's constructor arguments."""

    def triple(name: str) -> tuple[int, int, int]:
        space = cfg[f"{name}_xy"]
        return cfg[f"{name}_t"], space, space

    return CoordTokConfig.from_dict(
        {
            **{name: cfg[name] for name in SAME},
            "enc_patch_size": triple("enc_patch_size"),
            "latent_resolution": triple("latent_resolution"),
            "latent_channels": cfg["latent_n_features"],
            "latent_patch_size": triple("latent_patch_size"),
            "dec_patch_size": triple("dec_patch_size"),
            "unpatchify": "square_root",
        }
    )


def build_sit_config(cfg: dict) -> SiTConfig:
    """Returns our configuration of the reference's constructor arguments."""
    same = ("patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
    time, space = cfg["input_size"]
    return SiTConfig(
        input_size=(time, space, space),
        class_dropout=cfg["class_dropout_prob"],
        learn_sigma=cfg["learn_sigma"],
        **{name: cfg[name] for name in same},
    )


def statistics_of(pairs) -> LatentStatistics:
    means, stds = zip(*pairs, strict=True)
    return LatentStatistics(named(means), named(stds))


def named(planes) -> dict[str, Tensor]:
    return dict(zip(PLANE_AXES, planes, strict=True))


def grid_of(video: Tensor, num_frames: int, patch: tuple[int, int, int]) -> list[int]:
    sizes = (num_frames, *video.shape[1:3])
    return [size // part for size, part in zip(sizes, patch, strict=True)]


def coords_and_targets(video: Tensor, points: Tensor, grid, patch) -> tuple[Tensor, Tensor]:
    """Returns the reference's coordinates and targets of points [1, N, 3]."""
    targets = video_patches(video.permute(3, 0, 1, 2)[None], points, patch)
    return points[0] / (torch.tensor(grid) - 1), targets[0]


class Adapter:
    # The step sizes of an adaptive solver hang on error estimates that are pure float32 rounding
    # here (6e-6 of the tolerance), so no two implementations take the same steps; the recorded end
    # is 5.6e-4 away from the exact flow (rk4 with 40 steps, dopri5 with rtol 1e-6), and the
    # solver's own tolerance is 1e-3.
    overrides = {"sit_rect/ode_dopri5_3_Linear": (1e-3, 1e-7)}

    def tokenizer(self, cfg: dict) -> CoordTok:
        return CoordTok(build_config(cfg))

    def encode(self, tok: CoordTok, video: Tensor, n_frames: Tensor) -> tuple[Tensor, ...]:
        encoding = tok.encode(video.permute(0, 4, 1, 2, 3), num_frames=n_frames[:, 0])
        return tuple(encoding.latent.values())

    def embed(self, tok: CoordTok, coords: Tensor, planes) -> Tensor:
        return tok.point_features(named(planes), coords)

    def decode(self, tok: CoordTok, coords: Tensor, planes) -> Tensor:
        return tok.decode_points(named(planes), coords)

    def decode_video(
        self,
        tok: CoordTok,
        planes,
        *,
        img_size: int,
        num_frames: int,
        patch_pred: tuple[int, int, int],
        max_num_frames: int,
        point_per_vid: int,
        Nslice: int | None,
    ) -> Tensor:
        assert tok.config.video_shape == (max_num_frames, img_size, img_size)
        if Nslice is None:
            frame = (img_size // patch_pred[1]) ** 2
            Nslice = frame * num_frames // patch_pred[0] // point_per_vid
        encoding = Encoding(named(planes), num_frames, (img_size, img_size), frame_rule="reference")
        return tok.decode(encoding, num_slices=Nslice)[0].permute(1, 2, 3, 0)

    def loss(
        self, tok: CoordTok, video: Tensor, coords: Tensor, targets: Tensor, n_frames: Tensor
    ) -> Tensor:
        """Mean over points and values, sum over the batch."""
        clip, frames = video.permute(0, 4, 1, 2, 3), n_frames[:, 0]
        patches = tok(clip, points=coords, num_frames=frames).reconstruction
        return ((patches - targets) ** 2).mean(dim=(1, 2)).sum()

    def sample_patches(
        self, video: Tensor, n_frames: int, n_points: int, num_frames: int, patch, seed: int
    ) -> tuple[Tensor, Tensor]:
        grid = grid_of(video, num_frames, patch)
        torch.manual_seed(seed)
        points = random_points(torch.tensor([n_frames]), n_points, grid, patch[0])
        return coords_and_targets(video, points, grid, patch)

    def sample_frames(
        self, video: Tensor, n_frames: int, n_frames_recon: int, num_frames: int, patch, seed: int
    ) -> tuple[Tensor, Tensor]:
        grid = grid_of(video, num_frames, patch)
        torch.manual_seed(seed)
        points = random_frame_points(torch.tensor([n_frames]), n_frames_recon, grid)
        return coords_and_targets(video, points, grid, patch)

    @staticmethod
    def keys(cfg: dict) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            model = CoordTok(build_config(cfg))
        return {name: tuple(value.shape) for name, value in model.state_dict().items()}

    # The generator. Planes are tuples (xy, yt, xt), channels first.

    def sit(self, cfg: dict) -> SiT:
        return SiT(build_sit_config(cfg))

    def sit_forward(self, sit: SiT, planes, t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return tuple(sit(named(planes), t, y).values())

    def transport_loss(self, sit: SiT, x1, x0, t: Tensor, y: Tensor, path: str) -> Tensor:
        network = sit.network(y)
        return Transport(path.lower()).loss(network, named(x1), t=t, x0=named(x0))

    def transport_sample(self, x1, seed: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        torch.manual_seed(seed)
        return Transport().draw(tuple(x1))

    def ode(self, sit: SiT, z, y: Tensor, method: str, num_steps: int, path: str):
        """The reference counts points in time, one more than steps."""
        options: dict = {"method": {"heun2": "heun"}.get(method, method)}
        if method != "dopri5":
            options["num_steps"] = num_steps - 1
        x = sample_ode(Transport(path.lower()), sit.network(y), named(z), **options)
        return tuple(x.values())

    def sde(
        self,
        sit: SiT,
        z,
        y,
        method,
        num_steps,
        diffusion_form,
        last_step,
        last_step_size,
        noise,
        seed,
    ):
        """The reference does num_steps - 1 noisy steps, and the last one if there is one."""
        torch.manual_seed(seed)
        x = sample_sde(
            Transport(),
            sit.network(y),
            named(z),
            method=method.lower(),
            num_steps=num_steps - (last_step is None),
            diffusion=diffusion_form,
            last_step=None if last_step is None else last_step.lower(),
            last_step_size=last_step_size,
        )
        return tuple(x.values())

    def stats(self, planes):
        counter = StatisticsCounter()
        for i in range(planes[0].shape[0]):
            counter.update(named([plane[i : i + 1] for plane in planes]))
        found = counter.result()
        return tuple((found.mean[plane], found.std[plane]) for plane in PLANE_AXES)

    def normalize(self, planes, stats) -> tuple[Tensor, ...]:
        return tuple(statistics_of(stats).normalize(named(planes)).values())

    def denormalize(self, planes, stats) -> tuple[Tensor, ...]:
        return tuple(statistics_of(stats).denormalize(named(planes)).values())

    # Metrics.

    def frechet(self, a: Tensor, b: Tensor) -> Tensor:
        return frechet_distance(a, b)

    def fvd_preprocess(self, video: Tensor) -> Tensor:
        return fvd_preprocess(video.permute(0, 4, 1, 2, 3))

    def i3d(self, state: dict[str, Tensor]) -> I3D:
        network = I3D()
        network.load_state_dict(state, strict=True)
        return network.eval()
