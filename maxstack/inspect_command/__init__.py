"""`maxstack inspect PATH`: what a run, a checkpoint, a model folder, prepared data or a run file holds and costs.

Read in this order: `places` (what a path is), `facts` (a run, checkpoint or model as plain values), `data` (prepared
data, and packed rows decoded), `tables` (both for people), `command` (the verb). Tables read no array.
"""

from maxstack.inspect_command.command import main

__all__ = ["main"]
