"""Rules of the package as a whole: what imports what, what importing costs, what the compiled
module holds."""

import ast
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import vtok_ext as vt
from vtok_ext import _native

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "vtok_ext"
# Each part may import those before it; data and metrics are leaves that training and cli use.
ORDER = ["_version", "_native", "ops", "layers", "models", "diffusers_vae", "training", "cli"]
LEAVES = ["data", "metrics"]


def imported_parts(path: Path) -> set[str]:
    """Top-level parts of vtok_ext that a file imports, anywhere in it."""
    package = ["vtok_ext", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "vtok_ext" and len(parts) > 1:
                found.add(parts[1])
    return found


def test_imports_point_one_way():
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for imported in imported_parts(path) - {part, "_C"}:
            where = f"{path.relative_to(REPOSITORY)} imports {imported}"
            if imported in LEAVES:
                assert part in (*LEAVES, "training", "cli"), where
            elif part in LEAVES:
                assert imported in ("_version", "_native", "ops", "models"), where
            elif imported in ORDER:
                assert ORDER.index(imported) < ORDER.index(part), where


def test_only_native_imports_the_compiled_module():
    users = [p for p in PACKAGE.rglob("*.py") if "_C" in imported_parts(p)]
    assert users == [PACKAGE / "_native.py"]


def test_no_drawers():
    for path in REPOSITORY.glob("[!.]*/**/*"):
        if "build" not in path.parts:
            assert path.stem not in ("utils", "util", "misc", "common", "others"), path
            assert path.stem != "helpers" or path.parent.name == "python_tests", path


def test_importing_is_light():
    """torch, numpy and the compiled module only: the command line's packages load when a command
    runs."""
    heavy = ("av", "typer", "rich", "omegaconf", "safetensors", "huggingface_hub", "diffusers")
    code = f"import sys, vtok_ext; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_versions_agree():
    text = (REPOSITORY / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"$', text, re.MULTILINE)[1]
    assert vt.__version__ == version == vt.build_info()["version"]


def test_extras_of_the_contract_exist():
    text = (REPOSITORY / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    names = set(re.findall(r"^(\w+) = ", section, re.MULTILINE))
    assert {"video", "train", "eval", "scale", "test", "bench"} <= names
    # What messages of the package tell users to install is there, too.
    for path in PACKAGE.rglob("*.py"):
        assert set(re.findall(r"vtok_ext\[(\w+)\]", path.read_text())) <= names, path


def cuda_images(module: bytes) -> set[tuple[str, int]]:
    """{("cubin" or "ptx", architecture)} in the fat binaries of a compiled module, without CUDA's
    tools.

    A fat binary is a header (magic, version, header size, 64-bit payload size) and entries; an
    entry has its kind (1 PTX, 2 cubin) at byte 0, header size at 4, payload size at 8, architecture
    at 28.
    """
    images = set()
    magic = struct.pack("<I", 0xBA55ED50)
    start = module.find(magic)
    while start >= 0:
        _, header, payload = struct.unpack_from("<HHQ", module, start + 4)
        entry = start + header
        while entry < start + header + payload:
            kind, _, size_of_header, size = struct.unpack_from("<HHIQ", module, entry)
            (architecture,) = struct.unpack_from("<I", module, entry + 28)
            images.add(("ptx" if kind == 1 else "cubin", architecture))
            entry += size_of_header + size
        start = module.find(magic, start + header + payload)
    return images


def test_cuda_architectures():
    """Cubins for A100 and H100/H200, and PTX that newer chips compile."""
    info = vt.build_info()
    if info["cuda_version"] is None:
        pytest.skip("built without CUDA")
    images = cuda_images(Path(_native.module().__file__).read_bytes())
    expected = set()
    for architecture in info["cuda_architectures"].split():
        number = int(re.match(r"\d+", architecture)[0])
        expected.add(("ptx" if "virtual" in architecture else "cubin", number))
    assert expected <= images


def test_no_libtorch():
    done = subprocess.run(["ldd", _native.module().__file__], capture_output=True, text=True)
    assert not re.search("libtorch|libc10|libcudart|libcuda", done.stdout), done.stdout


def test_one_openmp_runtime_after_torch():
    code = """if True:
        import re, torch, vtok_ext as vt
        vt.fsq(torch.randn(100_000, 6), [8] * 6)
        maps = open("/proc/self/maps").read()
        print(len(set(re.findall(r"\\S*/lib[gi]?omp\\S*\\.so\\S*", maps))))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1", "two OpenMP runtimes fight over the cores"
