"""What quality means: fidelity to the untouched model, recall of planted facts, and honest intervals."""
