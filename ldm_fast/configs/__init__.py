"""Our own configurations: frozen dataclasses, the checks they share, and dictionaries to dataclasses and back.

Nothing here knows a model, a file or another program's format; `interop` translates those.
"""
