"""The attention explorer: click a word, see the region."""

from gloria_core.viz.explorer.widget import Explorer

__all__ = ["Explorer"]
