"""Clips and captions: found, decoded, cached, ordered and loaded. Never imports models: encoders arrive as callables."""
