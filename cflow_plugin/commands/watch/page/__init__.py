"""The page beside the line."""

__all__ = ["Live", "start_page"]

from cflow_plugin.commands.watch.page.live import Live
from cflow_plugin.commands.watch.page.server import start_page
