"""What lies on disk: runs, checkpoints, sample sets, provenance."""
