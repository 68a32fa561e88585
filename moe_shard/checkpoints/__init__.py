"""Save, restore and convert checkpoints, and import models from elsewhere."""
