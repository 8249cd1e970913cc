"""Adapters on a tree of modules: its targets, the forward path with them, and merging into its weights."""

from .attaching import Attachment, attach, remove_all
from .merging import Merged, merge_into
from .placement import AttachReport
from .targets import TargetReport, find_targets

__all__ = [
    "AttachReport",
    "Attachment",
    "Merged",
    "TargetReport",
    "attach",
    "find_targets",
    "merge_into",
    "remove_all",
]
