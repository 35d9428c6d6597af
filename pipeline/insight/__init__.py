"""What the runs say together."""
