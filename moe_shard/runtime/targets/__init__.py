"""Name absent hardware, and find its compiler."""
