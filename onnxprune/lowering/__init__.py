"""Zeros in groups turned into speed: covers, forms, times, and the model rewritten."""
