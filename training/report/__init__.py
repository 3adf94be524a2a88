"""From a run folder to report.html; reads files alone."""
