"""Raw downloads and folders, each read by a module of its own, and written as a data set in Decathlon layout."""

from .prepare import prepare

__all__ = ["prepare"]
