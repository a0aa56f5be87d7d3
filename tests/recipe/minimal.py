"""The shortest recipe: the keys that have no default."""

MINIMAL = """\
[model]
family = "ltx"
path = "models/ltx"
[data]
path = "clips"
buckets = ["17x64x96"]
"""
