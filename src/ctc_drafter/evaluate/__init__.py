"""Measures decoding. Reading order: `tasks` (prompts), `run` (the measurement), `environment` (what ran it)."""
