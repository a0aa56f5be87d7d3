"""Memory of a step, predicted: an accelerator that is simulated, its allocator, and what lived there when."""
