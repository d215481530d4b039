"""``teemate-gateway``: functions over HTTP.

A supervisor listens (Unix socket or loopback) and keeps worker processes, which share the one enclave.
Each worker serves connections with hypercorn on trio and invokes with slots of its own, so whatever kills
one worker costs its own requests and no others.
"""
