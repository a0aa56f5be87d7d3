"""Finds, decodes, caches, orders and loads clips and captions. Imports no models: encoders are passed in as callables."""
