"""Faces of the one service: each turns a protocol's messages into requests, and replies and errors back."""
