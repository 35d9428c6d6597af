"""What Ray runs in place of a new Python for a worker: it asks the server of tests/fork_server.py for a process."""

import json
import os
import socket
import sys

with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect(os.environ["VITSCALE_FORK_SERVER"])
    socket.send_fds(server, [json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()], [0, 1, 2])
