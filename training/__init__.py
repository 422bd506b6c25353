"""The engine that trains and evaluates a model: loss, training step, devices, checkpoints."""
