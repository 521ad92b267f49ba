"""Models: they hold weights and call ops."""
