"""Whole models: `LatentDiffusion`, and our models inside diffusers' pipelines."""
