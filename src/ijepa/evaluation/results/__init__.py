"""Files of results, and tables of them."""
