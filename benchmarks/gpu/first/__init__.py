"""The checks that are made in the first minutes in which a GPU is at hand: `python -m benchmarks.gpu --first`.

`run` starts each check in a process of its own, since one that fails on a GPU may leave the process unusable. A check is
a function that is given a `Bench` and returns its verdict, one line; it raises `Failed`, or anything else, if something is
wrong, and `Skipped` if there is nothing to check here.
"""
