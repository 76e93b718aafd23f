VERSION = "0.1.0"  # pyproject.toml reads it from here, without importing torch
