"""What the broker tells of itself: log, metrics, traffic."""
