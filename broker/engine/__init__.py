"""The past, and other nodes."""
