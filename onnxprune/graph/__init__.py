"""ONNX models: files in and out, weights in their roles, masks."""
