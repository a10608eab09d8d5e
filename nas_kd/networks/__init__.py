"""What a student is made of, and enough to load a result: convolutions, plans, hub, definition, ONNX."""
