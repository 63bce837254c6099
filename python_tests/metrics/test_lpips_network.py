"""LPIPS: where its weights come from, and that it never trains."""

import hashlib

import pytest
import torch

import vtok_ext as vt
from vtok_ext.metrics import lpips_network as module
from vtok_ext.metrics.lpips_network import LPIPS, VGG16_CHANNELS, published_lpips, random_lpips
from vtok_ext.training.recipe import LossRecipe
from vtok_ext.training.tokenizer_task import perceptual_network

NARROW = (4, 8, 8, 8, 8)
NUMBERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def images(seed, n=2):
    return torch.rand(n, 3, 24, 20, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty torch hub cache, and no installed lpips."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(module, "_installed_heads", list)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


@pytest.fixture
def small(monkeypatch):
    """LPIPS is narrow within the test, so that its files are small."""
    monkeypatch.setattr(LPIPS.__init__, "__defaults__", (NARROW,))


def files(network):
    """(backbone, heads) as torchvision and LPIPS name their tensors."""
    state = network.state_dict()
    backbone = {
        f"features.{name.split('.', 2)[2]}": value
        for name, value in state.items()
        if name.startswith("net.")
    }
    return backbone, {k: v for k, v in state.items() if k.startswith("lin")}


def test_distance():
    network = random_lpips(3, NARROW)
    a, b = images(0), images(1)
    distance = network(a, b)
    assert distance.shape == (2, 1, 1, 1) and bool((distance > 0).all())
    assert bool((network(a, a) == 0).all())
    torch.testing.assert_close(network(b, a), distance)
    nearer = network(a, a + 0.1 * (b - a))
    assert bool((nearer < distance).all())


def test_seed_decides_the_weights():
    first, second, third = (random_lpips(seed, NARROW).state_dict() for seed in (1, 1, 2))
    name = "net.slice3.12.weight"
    assert torch.equal(first[name], second[name]) and not torch.equal(first[name], third[name])


def test_never_trains():
    network = random_lpips(0, NARROW).train()
    assert not any(m.training for m in network.modules())
    assert not any(p.requires_grad for p in network.parameters())


def test_gradient_is_finite_where_no_feature_is_active():
    """The norm of a zero vector has no derivative: such a pixel gives none."""
    network = random_lpips(0, NARROW)
    with torch.no_grad():
        network.net.slice1["0"].bias.fill_(-100.0)
    x = images(0).requires_grad_()
    network(x, images(1)).sum().backward()
    assert bool(torch.isfinite(x.grad).all())


def test_published_weights_from_paths(tmp_path, small):
    network = random_lpips(5, NARROW)
    paths = []
    for name, tensors in zip(("vgg16.pth", "vgg.pth"), files(network), strict=True):
        paths.append(tmp_path / name)
        torch.save(tensors, paths[-1])
    assert len(files(network)[0]) == 2 * len(NUMBERS)
    loaded = published_lpips(*paths)
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    torch.save({}, paths[1])
    with pytest.raises(ValueError, match=r"vgg.pth must hold \[1, 4, 1, 1\] for lin0.*, got none"):
        published_lpips(*paths)


def test_given_pickles_with_an_old_torch(tmp_path, small, monkeypatch):
    network = random_lpips(5, NARROW)
    paths = []
    for name, tensors in zip(("vgg16.pth", "vgg.pth"), files(network), strict=True):
        paths.append(tmp_path / name)
        torch.save(tensors, paths[-1])
    monkeypatch.setattr(torch, "__version__", "2.4.1")
    with pytest.raises(ValueError, match=r"^published_lpips: torch must be >= 2\.6 .*vgg16.pth"):
        published_lpips(*paths)
    loaded = published_lpips(*paths, trust_checkpoint=True)
    assert torch.equal(loaded.lin2.model["1"].weight, network.lin2.model["1"].weight)
    values = {"perceptual_backbone": str(paths[0]), "perceptual_heads": str(paths[1])}
    trusting = LossRecipe(**values, trust_checkpoint=True)
    assert perceptual_network(trusting) is not None
    with pytest.raises(ValueError, match="published_lpips: torch must be"):
        perceptual_network(LossRecipe(**values))
    image = torch.zeros(1, 3, 1, 16, 16)
    options = {"backbone": paths[0], "heads": paths[1], "trust_checkpoint": True}
    assert vt.metrics.lpips(image, image, **options).item() == 0


def test_published_weights_from_the_cache_are_verified(cache, small, monkeypatch):
    backbone, heads = files(random_lpips(5, NARROW))
    torch.save(backbone, cache / "vgg16-397923af.pth")
    torch.save(heads, cache / "vgg.pth")
    with pytest.raises(ValueError, match="vgg16-397923af.pth must have sha256 397923af"):
        published_lpips()
    digest = hashlib.sha256((cache / "vgg16-397923af.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(module, "_BACKBONE_SHA256_START", digest[:8])
    with pytest.raises(ValueError, match="vgg.pth must have md5 d507d734"):
        published_lpips()
    digest = hashlib.md5((cache / "vgg.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(module, "_HEADS_MD5", digest)
    assert torch.equal(published_lpips().lin2.model["1"].weight, heads["lin2.model.1.weight"])


def test_absent_weights_are_an_error_that_says_where_they_were_looked_for(cache):
    with pytest.raises(FileNotFoundError, match=r"backbone must be a file, got none at .*397923af"):
        published_lpips()
    with pytest.raises(FileNotFoundError, match="perceptual_weight 0, which needs none"):
        published_lpips(cache / "nowhere.pth")


def test_errors():
    with pytest.raises(ValueError, match=r"images must be two equal .* and \[2, 3, 8, 8\]"):
        random_lpips(0, NARROW)(images(0), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"channels must be five counts >= 1, got \[1, 2\]"):
        LPIPS((1, 2))
    assert len(VGG16_CHANNELS) == 5
