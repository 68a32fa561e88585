"""Hold the folder that is put on PYTHONPATH: Python runs its `sitecustomize.py` at start."""
