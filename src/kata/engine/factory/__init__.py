"""Machines that go on from a template instead of booting.

A template is a machine of some shape that was booted once, with an agent that answers and nothing of any sandbox in it,
and saved. `template` says which one belongs to a machine, on every start; `maker` makes it, in a process of its own.
"""
