"""The version: of the package, of what is installed (pyproject.toml reads it here) and of the native modules."""

__version__ = "0.1.0"
