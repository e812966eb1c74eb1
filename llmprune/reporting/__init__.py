"""The report page on runs and results, and the demo page for trying models."""
