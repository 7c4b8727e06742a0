"""The chip's instructions, one file a family: integer-exact forward, straight-through backward."""
