"""Quiet, single-threaded tests: two cores are shared, and small tensors gain nothing from threads."""

import torch

torch.set_num_threads(1)
