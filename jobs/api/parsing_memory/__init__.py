"""The memory that request bodies take when they are parsed: its estimate, and its budget."""
