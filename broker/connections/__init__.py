"""Clients' connections: who comes in, what they ask, what goes out to them."""
