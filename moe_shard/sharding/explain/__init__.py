"""Explain where a model's arrays lie on a mesh, and what is wrong with a rule table."""
