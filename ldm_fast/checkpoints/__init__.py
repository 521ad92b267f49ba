"""Checkpoints: what is in a file, and its parts as models of ours."""
