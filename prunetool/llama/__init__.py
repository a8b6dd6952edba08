"""Llama and closely related families: configuration, weights, equations. Does no file access."""
