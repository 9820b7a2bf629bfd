"""Measurement of decoding. Reading order: `tasks`, `methods`, `runner`, `results`, `bench`."""
