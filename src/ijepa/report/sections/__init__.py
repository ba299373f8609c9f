"""The sections of the page: one file each, which computes what the template of the same name shows."""
