"""Fixtures of the broker's tests."""
