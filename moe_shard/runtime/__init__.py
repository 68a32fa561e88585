"""Start devices and processes, and compile the step for devices present or absent."""
