"""Lightning callbacks that train a network in the arithmetic of the chip that will run it."""

__version__ = "0.1.0"
