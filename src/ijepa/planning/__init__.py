"""The parts of `ijepa plan`: sizes, memory, hardware, time and energy, and the page that shows them."""
