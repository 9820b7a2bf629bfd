"""Scripts that made the shipped target and drafter: pretraining, distillation, training, model card."""
