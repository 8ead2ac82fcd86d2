"""Parameters as safetensors that transformers loads, and back: `write_export`, `load_exported`."""
