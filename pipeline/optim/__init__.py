"""Learning rates as pure functions of the step, and the optimizers with what they keep."""
