"""Redis as nodes speak to it: names, messages, subscriptions, and the only way to asyncio."""
