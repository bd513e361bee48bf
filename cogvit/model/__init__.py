"""The plain PyTorch model: what users import, export and evaluate."""
