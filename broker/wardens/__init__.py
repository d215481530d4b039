"""Wardens: the processes that enter enclaves on the broker's behalf."""
