"""The memory governor in the loops of other libraries, and in one's own."""
