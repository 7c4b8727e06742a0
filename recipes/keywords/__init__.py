"""Keyword spotting: one spoken word among many, by a small convolutional network."""
