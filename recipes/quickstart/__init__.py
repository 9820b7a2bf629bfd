"""How the shipped target and drafter were made: corpus and target, distillation, drafter, model card."""
