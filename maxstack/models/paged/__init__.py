"""Decoding against a cache in pages that many sequences share: what a layer does, the pools, the forward pass."""
