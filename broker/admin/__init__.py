"""The operators' port: API, metrics, overview."""
