"""Measuring a model in onnxruntime: what pruning cost and what it bought."""
