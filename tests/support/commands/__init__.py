"""raymoe's commands as a user runs them, and what the tests ask of them."""
