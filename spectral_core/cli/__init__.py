"""The commands. What they need of diffusers goes through :mod:`..pipelines`."""
