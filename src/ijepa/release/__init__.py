"""A finished run as others receive it: weights, what made them, what they can do, and checksums over all of it."""
