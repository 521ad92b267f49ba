"""The diffusion process: schedules, parameterisations, samplers, conditions. Nothing here knows a model."""
