"""Measurements against the peers: `python dev.py bench NAME`, results in benchmarks/results/."""
