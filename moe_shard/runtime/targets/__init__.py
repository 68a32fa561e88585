"""Name hardware that is not there, and find its compiler."""
