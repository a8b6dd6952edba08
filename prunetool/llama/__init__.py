"""Llama and the families near to it: configuration, weights, equations. Knows no files."""
