"""What backends say through Redis, and what is told to them."""
