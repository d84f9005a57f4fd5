"""Search: recipes are measured on this machine, the dominated ones dropped, the best kept."""
