"""Shows the progress of a run: progress line, metrics, trackers, videos."""
