"""Measurements of this machine: `ijepa bench step|data|masks|attention`.

Methods that are compared take turns within one process, so that other load on the machine affects all of them. Time is
the CPU time of the process where the CPU does the work, and ratios are medians over rounds. On a shared machine, only
the ratios are meaningful.
"""
