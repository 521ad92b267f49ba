"""Files: written whole or not at all, tensors of untrusted origin, pictures."""
