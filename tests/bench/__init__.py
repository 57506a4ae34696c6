"""Benchmarks: measured on purpose, never collected by pytest."""
