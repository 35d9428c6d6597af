"""One file a family of models, each readable alone; `flops.py` says what a forward pass costs."""
