"""State, losses, optimizers, the step, the loop, checkpoints, evaluation."""
