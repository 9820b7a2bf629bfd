"""CTC (Connectionist Temporal Classification) on blocks of frames: lattice, losses, prefix search."""
