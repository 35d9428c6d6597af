"""From one checkpoint to many tasks: tasks, protocols, a fine-tuning, and the sweep over them."""
