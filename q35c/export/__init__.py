"""Other forms of a model. `q35c.export.onnx` writes ONNX; importing it needs the `onnx` package."""
