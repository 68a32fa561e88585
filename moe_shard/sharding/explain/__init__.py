"""Explain where a model's arrays are placed on a mesh, and what is wrong with a rule table."""
