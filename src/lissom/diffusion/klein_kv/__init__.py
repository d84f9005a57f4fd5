"""Reference-token cache."""
