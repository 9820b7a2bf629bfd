"""Other engines, each in a file or folder of its own, and what they share. Nothing here is imported unless asked for."""
