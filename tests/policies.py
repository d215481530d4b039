"""Policies for the brokers of these tests."""

from __future__ import annotations

import os

from images import BuiltImage


def enclave_policy(name: str, image: BuiltImage, settings: str = "slots_per_client = 8") -> str:
    """One [[enclave]] that this user may attach to."""
    return f"""
[[enclave]]
name = "{name}"
image = "{image.sgxs}"
sigstruct = "{image.sigstruct}"
{settings}

[[enclave.attach]]
uid = {os.geteuid()}
"""
