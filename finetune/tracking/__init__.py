"""What one sees of a run: progress, metrics, trackers, videos."""
