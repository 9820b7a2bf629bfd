"""Benchmarks and generators of this repository's pages; not part of the package."""
