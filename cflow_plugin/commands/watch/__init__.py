"""An exported model on images as they come: a folder, a video or a camera."""

__all__ = ["watch"]

from cflow_plugin.commands.watch.watch import watch
