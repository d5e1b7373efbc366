"""Readers of music and images."""
