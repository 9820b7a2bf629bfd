"""Other engines, each in a file or folder of its own, and what they share. Imported only when asked for."""
