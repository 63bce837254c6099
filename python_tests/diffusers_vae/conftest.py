"""Everything here needs diffusers: the `[diffusers]` extra."""

from helpers import import_or_skip

import_or_skip("diffusers")
