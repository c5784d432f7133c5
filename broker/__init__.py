"""A real-time WebSocket broker on Trio."""

__version__ = "0.1.0"
