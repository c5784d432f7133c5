"""The edge: listener, handshake, pump, sessions, commands."""
