"""The parts of `ijepa plan`: model size, FLOPs, memory, hardware, time, energy, and the text that shows them."""
