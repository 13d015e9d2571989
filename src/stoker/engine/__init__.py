"""What a training step is made of: device, precision, randomness, schedules, gradients."""
