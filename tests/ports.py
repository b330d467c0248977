"""A port for a test's own server."""

import random
import socket

# Below the ports that Linux gives to connections (32768 on): one of those could be taken by any of the
# connections that gloo opens between the choice here and the start of the server.
_CHOICES = range(15000, 32000)


def free_port() -> int:
    """A port of this machine that nobody uses."""
    chance = random.SystemRandom()  # Tests seed the common generator.
    while True:
        port = chance.choice(_CHOICES)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
