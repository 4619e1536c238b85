"""``python -m lmx.bench``: measures an OpenAI-compatible server as its clients see it.

``client`` holds the streams, ``figures`` turns what they saw into numbers, ``prompts`` makes the text, ``server``
starts a server where none runs. Beside rich it uses the standard library alone, because it shares the machine with what
it measures, and it imports nothing of the server.
"""
