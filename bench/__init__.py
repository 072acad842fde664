"""Benchmarks: each writes rows to bench/results, and README tables are made from those rows alone."""
