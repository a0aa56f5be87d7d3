"""The page of a run: report.html, self-contained, made of what lies in the run's folder alone."""
