"""Everything here needs diffusers: the `[diffusers]` extra."""

import pytest

pytest.importorskip("diffusers")
