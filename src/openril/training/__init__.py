"""Training: the warm start, discriminator pre-training, the loop, and checkpoints that continue exactly."""
