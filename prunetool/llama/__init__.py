"""The Llama architecture: configuration, layer weights, equations. Knows no files."""
