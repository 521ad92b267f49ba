"""Names and configurations of other programs, as tables that are bijections; nothing here knows a model."""
