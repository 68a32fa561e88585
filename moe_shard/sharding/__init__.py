"""Resolve by mesh, rule table and annotations which mesh axes shard each dim, and record why."""
