"""Turns a trained run into a bundle that proves itself: checkpoint → ONNX graphs → parity with torch → bundle."""
