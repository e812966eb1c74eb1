"""What a job will need, known before anything is loaded."""
