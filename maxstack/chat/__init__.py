"""`maxstack chat`: a conversation with a model in the terminal, or through a pipe.

- `settings`: what /set changes, typed
- `reasoning`: thoughts apart from the answer, as text comes
- `conversation`: messages, context, the cache between turns
- `saved`: /save and /load
- `rendered`: /show
- `commands`: the lines that begin with a slash
- `screen`: what is written where, and how
- `keyboard`: lines with editing and history, Ctrl-C
- `talk`: input by input
- `command`: the verb
"""
