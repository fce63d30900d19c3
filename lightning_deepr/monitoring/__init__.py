"""What rewiring does to a network: statistics of connections, units that are cut off, ages. Lightning is not needed."""
