"""What outlives the broker, and how the next one goes on with it."""
