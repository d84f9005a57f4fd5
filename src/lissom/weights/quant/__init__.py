"""Low-bit weights: how they are chosen, and how they are saved and loaded."""
