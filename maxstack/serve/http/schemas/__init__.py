"""What requests may hold: each field with its bounds."""
