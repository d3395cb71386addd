"""Benchmarks that anyone can run; each prints one JSON object and keeps it under `results/`."""
