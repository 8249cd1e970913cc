"""The commands. Like :mod:`..pipelines`, they may import diffusers, and only inside functions."""
