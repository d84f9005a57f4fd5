"""Methods that act on diffusion models, and a small editing model to test them on."""
