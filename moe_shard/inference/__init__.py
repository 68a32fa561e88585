"""Writing text with a model: where its parameters come from, the compiled steps, what is drawn."""
