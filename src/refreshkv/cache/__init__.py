"""What one layer keeps: the full store, the ring of the partial cache, and their state."""
