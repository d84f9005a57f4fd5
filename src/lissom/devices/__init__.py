"""Machines: what they are and what they can reach."""
