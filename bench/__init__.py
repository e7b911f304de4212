"""Benchmarks: speed as a ratio to something measured in the same run on the same machine."""
