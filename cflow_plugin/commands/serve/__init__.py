"""``cflow-plugin serve``: exported models as a web service for many clients."""

__all__ = ["serve"]

from cflow_plugin.commands.serve.serve import serve
