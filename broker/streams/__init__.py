"""Rooms with history, in streams of Redis."""
