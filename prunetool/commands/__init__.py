"""Verbs: one file = one command = one function of the same name."""
