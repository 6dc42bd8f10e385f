"""Deciding which entries go: score, pattern, allocation, schedule."""
