"""The triplane features and their gradients that the CoordTok reference recorded.

Skipped where the recordings are not; see the fixture `parity_dir`.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

import vtok_ext as vt


@pytest.mark.parametrize("name", ["tok_square", "tok_release_geom"])
def test_features_and_gradients_of_the_planes(name, parity_dir):
    folder = parity_dir / "coordtok"
    seed = json.loads((folder / "manifest.json").read_text())["cases"][name]["seed"]
    inputs = load_file(folder / name / "in.safetensors")
    recorded = load_file(folder / name / "out.safetensors")
    coords = inputs["coords_off"]
    planes = [inputs[f"planes[{p}]"].clone().requires_grad_() for p in range(3)]
    features = vt.triplane_gather(*planes, coords)
    assert torch.equal(features, recorded["embed_off_grid[0]"]), "the same float32 arithmetic"
    # The recording's upstream gradient, as check_coordtok.py makes it.
    generator = torch.Generator().manual_seed(5 * seed)
    upstream = torch.randn(features.shape, generator=generator)
    for p, grad in enumerate(torch.autograd.grad(features, planes, upstream)):
        expected = recorded[f"embed_off_grid[{p + 1}]"]
        assert (grad - expected).abs().max() <= 1e-6 * expected.abs().max()
