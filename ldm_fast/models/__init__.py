"""UNet, first stages and condition encoders: modules that hold weights and call `ldm_fast.ops`.

Nothing here samples, trains or knows a whole checkpoint; no layer asks for a device or a backend.
"""
