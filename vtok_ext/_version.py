"""The version of this package; the compiled module must have been built from the same one."""

__version__ = "0.1.0"
