"""Weights on disk: loading by the shard, checkpoints, and exports that other tools load."""
