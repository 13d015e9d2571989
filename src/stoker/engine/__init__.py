"""The components of a training step: device, precision, randomness, schedules, gradients."""
