"""From a shard set to batches: plan (which picture), read (its bytes), image (its pixels), loader (batches)."""
