"""The recorded outputs of the CoordTok reference, compared by the script that comes with them.

Skipped where the recordings are not; see the fixture `parity_dir`.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ADAPTER = Path(__file__).with_name("coordtok_adapter.py")


@pytest.mark.parametrize(
    ("case", "compared"),
    [("tok_square", 9), ("tok_release_geom", 8)],
)
def test_tokenizer(case, compared, parity_dir):
    """Encoding with masks, triplane features, points, slices of whole clips, loss, all gradients,
    and the points that training draws."""
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


@pytest.mark.parametrize("tokens", [1280, 3072])
def test_state_dict_names_and_shapes_of_released_sizes(tokens, parity_dir):
    spec = importlib.util.spec_from_file_location("coordtok_adapter", ADAPTER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
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
