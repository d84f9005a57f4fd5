"""One check per method: its claim, measured on this machine."""
