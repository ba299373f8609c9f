"""Features of an encoder, and the images they come from."""
