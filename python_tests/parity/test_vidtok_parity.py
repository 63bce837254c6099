"""The recorded outputs of the VidTok reference, compared by the script that comes with them.

Skipped where the recordings are not: `VTOK_PARITY_DIR`, by default ../shared/parity.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PARITY = Path(os.environ.get("VTOK_PARITY_DIR", ROOT.parent / "shared" / "parity"))
ADAPTER = Path(__file__).with_name("vidtok_adapter.py")

pytestmark = pytest.mark.skipif(
    not (PARITY / "check_vidtok.py").is_file(), reason=f"no recordings in {PARITY}"
)


def run(*only: str) -> str:
    command = [sys.executable, PARITY / "check_vidtok.py", PARITY / "vidtok"]
    done = subprocess.run(
        [*map(str, command), "--adapter", str(ADAPTER), "--only", *only],
        capture_output=True,
        text=True,
        timeout=600,
    )
    failed = [line for line in done.stdout.splitlines() if "FAIL" in line]
    assert done.returncode == 0, "\n".join(failed) or done.stderr
    return done.stdout


MODELS = [
    "fsq_causal_488_262144",
    "fsq_causal_888_32768_v1_1",
    "fsq_noncausal_488_262144",
    "kl_causal_488_4chn",
]


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    report = run(name)
    assert "0 failed, 0 skipped" in report
    assert ("ok   grad norms: 0 of" in report) == (name in MODELS[2:])


def test_blocks_regularizers_and_metrics():
    report = run("units")
    assert "0 failed, 0 skipped" in report
    for block in ("v10.timedownsample.T5", "v10.attn", "v11.causalconv3d.T1", "resnetblock2d"):
        assert f"ok   unit {block} dx" in report
    assert "ok   unit psnr" in report and "ok   unit ssim" in report


def test_state_dict_names_and_shapes_of_released_configurations():
    report = run("keys")
    assert report.count("ok   keys vidtok_") == 23


def test_sampled_latent():
    """A seed gives the reference's posterior sample, drawn from the global CPU generator."""
    import importlib.util
    import json

    from safetensors.torch import load_file

    spec = importlib.util.spec_from_file_location("vidtok_adapter", ADAPTER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder, name = PARITY / "vidtok", "kl_causal_488_4chn"
    description = json.loads((folder / f"{name}.json").read_text())
    adapter = module.Adapter(description["config"])
    weights = load_file(folder / description["weights"].replace("/", ""))
    adapter.load({key: value.float() for key, value in weights.items()})
    case = load_file(folder / f"{name}.cases.safetensors")
    torch.manual_seed(7)
    with torch.no_grad():
        latent = adapter.model.encode(case["B1_T1_32x32/x"].float(), sample=True).latent
    expected = case["B1_T1_32x32/z_sampled_seed7"].float()
    assert torch.allclose(latent, expected, atol=1e-4 * float(expected.abs().max()))
