"""Generate hostile inputs of every command, and judge what the commands answer."""
