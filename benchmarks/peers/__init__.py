"""The contestants of `feed.py`: ours and the other loaders, each with what it is fed from and how it makes batches."""
