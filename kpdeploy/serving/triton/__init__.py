"""Triton: the model repository, its configuration, and a server on this machine."""
