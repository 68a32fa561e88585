"""Mesh, rule table and annotation: which mesh axes each dim of each array lives on, and why."""
