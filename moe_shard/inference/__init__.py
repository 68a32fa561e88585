"""Generate text with a model: load its parameters, compile its steps, sample tokens."""
