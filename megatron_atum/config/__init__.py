"""Typed configuration: what can be set, how it is read, what is refused."""
