"""What is learned: noise levels and losses, sliders from two prompts, several adapters taught to one."""

from .diffusion import Diffusion, FlowMatching
from .losses import Setup

__all__ = [
    "Diffusion",
    "FlowMatching",
    "Setup",
]
