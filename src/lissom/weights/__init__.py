"""Methods that change the weights of a model."""
