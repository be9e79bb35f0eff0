"""What a compressed directory holds, and whether it is sound."""
