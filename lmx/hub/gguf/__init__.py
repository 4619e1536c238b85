"""GGUF files: what they say, and what is made of it for MLX and for the tokenizer. Reads headers; never imports MLX,
but for ``weights``."""
