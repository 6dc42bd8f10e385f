"""ONNX models: files in and out, weights in their roles, masks."""

from onnxprune.graph import postponed

postponed.bring("onnx_ir", without="sympy")
