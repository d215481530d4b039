"""Enclaves: how they are built, kept, renewed and taken down."""
