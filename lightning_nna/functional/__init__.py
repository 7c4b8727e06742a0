"""Pure tensor mathematics: no module, no Lightning, no logger."""
