"""The `raymoe` commands as a user runs them, and the loads that tests put on them."""
