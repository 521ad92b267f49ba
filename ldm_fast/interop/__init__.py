"""Other programs' names and configurations, as tables that are bijections: compvis (the original), diffusers, CLIP.

Nothing here imports a model of ours; `layout` is handed one, which may be on the meta device.
"""
