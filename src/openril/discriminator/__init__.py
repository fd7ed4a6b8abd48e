"""The discriminator: network, prompt, training, health."""
