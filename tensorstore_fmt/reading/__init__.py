"""Reading runs: views, plans, fetching, and the handles that users hold."""
