"""Models from the Hub: what a name means there (``names``, ``choose``), and the child process that fetches it
(``fetch``). Only ``names`` and ``request`` are for the server's process; the others speak with the network."""
