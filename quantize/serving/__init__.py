"""vLLM beside this project: found in an environment of its own, started, asked over loopback, and never imported."""
