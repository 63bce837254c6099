"""Whether the kernels of this package can run on a CUDA device that torch can use.

They cannot when the package was built where no CUDA compiler was found, or on chips older than
those they are compiled for. With VTOK_NATIVE=0 no kernels are needed.
"""

from __future__ import annotations

import torch

from vtok_ext._native import build_info

# The oldest chips that the build has code for: sm_80 and compute_80 in CMakeLists.txt.
LEAST_CAPABILITY = (8, 0)
_REFERENCES = "VTOK_NATIVE=0 runs their slow definitions in plain torch"


def cuda_obstacle(index: int = 0) -> str | None:
    """Returns why kernels cannot run on CUDA device `index` and what to do, None if they can.

    Args:
        index: of a device that torch can use.
    """
    build = build_info()
    if not build["native"]:
        return None
    if build["cuda_version"] is None:
        return (
            "vtok_ext was built without CUDA kernels; put nvcc on the PATH and install it again "
            f"(pip install --force-reinstall --no-deps .), or {_REFERENCES}"
        )
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return (
            f"the kernels of vtok_ext need compute capability {least} or newer and "
            f"{torch.cuda.get_device_name(index)} has {major}.{minor}; use --device cpu, or "
            f"{_REFERENCES}"
        )
    return None
