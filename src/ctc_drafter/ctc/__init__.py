"""Connectionist Temporal Classification on blocks of frames: pure maths, torch only, batched."""
