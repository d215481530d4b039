"""Slots and grants: who holds what, and how it comes back."""
