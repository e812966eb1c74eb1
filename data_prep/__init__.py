"""Turn text into training data."""
