"""The page beside the line."""

__all__ = ["Live", "Models", "Review", "start_page"]

from cflow_plugin.commands.watch.page.live import Live
from cflow_plugin.commands.watch.page.models import Models
from cflow_plugin.commands.watch.page.review import Review
from cflow_plugin.commands.watch.page.server import start_page
