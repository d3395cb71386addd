"""Where rayssl runs, and how fast: benchmarks now; images and cluster manifests as they come."""
