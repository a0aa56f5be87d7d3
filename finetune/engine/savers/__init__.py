"""What is traded for memory: checkpointed activations, offloading, streaming and low-bit storage."""
