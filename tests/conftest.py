"""Quiet, single-threaded tests: two cores are shared, and small tensors gain nothing from threads."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
# The first example may wait for a compiler, and machines of continuous integration are uneven.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
