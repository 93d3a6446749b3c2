"""What makes the server operable: start, health, numbers, logs, traces, an orderly end."""
