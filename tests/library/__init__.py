"""The library as others use it: files of a user's own, run in the suite and from a wheel."""
