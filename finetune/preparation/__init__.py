"""Turns a dataset into cached items: inspects its clips, splits off held-out ones, and encodes them."""
