"""Hardware that is not there: its name on the command line, and its compiler."""
