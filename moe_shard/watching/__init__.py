"""Run anyone's program and read what XLA compiles in it, while it runs.

`child.py` starts the program and passes signals and its end through; `startup/` and `dumps.py` make
XLA write its programs to a folder and pick them up; `programs.py` says which of them are shown, and
whether an expectation holds.
"""
