"""The main job: two concepts with two methods: trained, saved, applied, fused, drawn, measured."""

from .command import main, parser

__all__ = [
    "main",
    "parser",
]
