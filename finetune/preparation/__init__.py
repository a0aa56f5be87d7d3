"""From a dataset to cached items: clips are inspected, split into trained and held out, and encoded."""
