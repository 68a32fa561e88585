"""Run anyone's program and read what XLA compiles in it, while it runs.

`child.py` starts the program and forwards signals and its exit code; `startup/` and `dumps.py` make
XLA write its programs to a folder and collect them; `programs.py` decides which of them are shown,
and whether an expectation holds.
"""
