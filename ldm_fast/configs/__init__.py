"""Configurations: our own frozen dataclasses, and their checks."""
