"""Checkpoints: saved, restored onto any mesh, converted, and models imported from elsewhere."""
