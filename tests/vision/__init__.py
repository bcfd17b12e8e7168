"""Tests of vision towers, and of the models that they are parts of."""
