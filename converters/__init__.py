"""Bridges between frameworks and onnxprune."""
