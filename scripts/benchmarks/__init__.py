"""What the benchmarks measure."""
