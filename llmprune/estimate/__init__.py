"""Estimates of a job's memory, time and cost, computed before anything is loaded."""
