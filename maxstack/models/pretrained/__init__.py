"""Models of other libraries: folders of safetensors and GGUF files, in and out."""
