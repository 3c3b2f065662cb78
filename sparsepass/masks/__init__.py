"""What a mask tensor means, read symbolically."""
