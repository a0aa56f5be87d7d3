"""A training run: the visible loop, the job it steps, what it reports, and its samples."""
