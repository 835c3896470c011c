"""`quantize doctor`: what this machine can train, run and export. Nothing here imports torch but `child`."""
