"""The runtime: devices and processes, and the step compiled for devices present or absent."""
