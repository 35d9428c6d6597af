"""A run: engine (DeepSpeed), checkpoint, loop, evaluate, and run.py, which puts them together."""
