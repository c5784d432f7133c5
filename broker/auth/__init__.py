"""Tokens, keys, permissions."""
