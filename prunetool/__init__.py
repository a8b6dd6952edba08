"""Make Llama checkpoints smaller without training, one layer at a time."""

__version__ = "0.1.0"
