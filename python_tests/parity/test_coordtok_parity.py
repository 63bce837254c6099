"""The recorded outputs of the CoordTok reference, compared by the script that comes with them.

Skipped where the recordings are not; see the fixture `parity_dir`.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vtok_ext.metrics.i3d import I3D
from vtok_ext.models._generators import create_generator

ADAPTER = Path(__file__).with_name("coordtok_adapter.py")


@pytest.mark.parametrize(
    ("case", "compared"),
    [("tok_square", 9), ("tok_release_geom", 8), ("sit_rect", 17), ("metrics", 3)],
)
def test_recorded_case(case, compared, parity_dir):
    """Tokenizer: encoding with masks, triplane features, points, slices of whole clips, loss, all
    gradients, and the points that training draws. Generator: forward, losses with gradients, ODE
    and SDE samplers, statistics. Metrics: Frechet distance, preprocessing of FVD, I3D."""
    command = [sys.executable, parity_dir / "check_coordtok.py", parity_dir / "coordtok"]
    done = subprocess.run(
        [*map(str, command), "--adapter", str(ADAPTER), "--only", case],
        capture_output=True,
        text=True,
        timeout=300,
    )
    failed = [line for line in done.stdout.splitlines() if "FAIL" in line or "SKIP" in line]
    assert done.returncode == 0, "\n".join(failed) or done.stderr
    assert f"{compared} compared, 0 failed, 0 skipped" in done.stdout, done.stdout


def load_adapter():
    spec = importlib.util.spec_from_file_location("coordtok_adapter", ADAPTER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tokens", [1280, 3072])
def test_state_dict_names_and_shapes_of_released_sizes(tokens, parity_dir):
    module = load_adapter()
    space = {1280: 16, 3072: 32}[tokens]
    wide = {"embed_dim": 1024, "num_layers": 24, "num_heads": 16}
    cfg = {f"{part}_{name}": value for part in ("enc", "dec") for name, value in wide.items()}
    cfg |= {"enc_patch_num_layers": 8, "enc_patch_size_xy": 16, "enc_patch_size_t": 8}
    cfg |= {"latent_resolution_xy": space, "latent_resolution_t": 32, "latent_n_features": 8}
    cfg |= {"latent_patch_size_xy": space // 2, "latent_patch_size_t": 16}
    cfg |= {"video_shape": [128, 128, 128], "dec_patch_size_xy": 8, "dec_patch_size_t": 1}
    recorded = json.loads((parity_dir / "coordtok" / f"keys_tokenizer_L_{tokens}.json").read_text())
    found = {name: list(shape) for name, shape in module.Adapter.keys(cfg).items()}
    assert found == recorded and len(found) == 743


def test_names_and_shapes_of_the_released_generator(parity_dir):
    with torch.device("meta"):
        found = create_generator("sit_l_2").state_dict()
    recorded = json.loads((parity_dir / "coordtok" / "keys_sit_L_2.json").read_text())
    assert {name: list(value.shape) for name, value in found.items()} == recorded
    assert len(found) == 266


def test_names_and_shapes_of_i3d(parity_dir):
    with torch.device("meta"):
        found = I3D().state_dict()
    recorded = json.loads((parity_dir / "coordtok" / "keys_i3d.json").read_text())
    assert {name: list(value.shape) for name, value in found.items()} == recorded
