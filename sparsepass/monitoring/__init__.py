"""What a budget kept of the attention, while serving."""
