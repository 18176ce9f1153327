"""Pages of documentation, and what is generated in them."""
