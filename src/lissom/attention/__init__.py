"""Attention of running models."""
