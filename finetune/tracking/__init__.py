"""Shows the progress of a run: metrics, trackers, videos."""
