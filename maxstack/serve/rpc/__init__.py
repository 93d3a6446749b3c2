"""The server over gRPC: maxstack.proto says what it offers. The generated files are made by regenerate.py."""
