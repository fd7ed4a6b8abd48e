"""The discriminator: network, prompt, losses, replay and health."""
