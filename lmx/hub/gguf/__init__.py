"""GGUF files: their headers, their words, and what MLX needs of them."""
