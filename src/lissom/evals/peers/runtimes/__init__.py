"""One module for each runtime, run by `lissom.evals.peers.worker`: see there for what it must have."""
